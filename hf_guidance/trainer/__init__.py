"""The Trainer with a guidance loss, and what a run needs around it.

Read `guidance_mixin` first. The other files hold checkpoints, checks before training, logs, steps that are not finite
or not guided, the model card, and pushes to the Hub.
"""

from hf_guidance.trainer.guidance_mixin import GUIDE_FOLDER, GuidanceMixin
from hf_guidance.trainer.guidance_trainer import GuidanceTrainer

__all__ = ["GUIDE_FOLDER", "GuidanceMixin", "GuidanceTrainer"]
