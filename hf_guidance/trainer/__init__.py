"""The Trainer with a guidance loss, and what a run needs around it.

`guidance_trainer` is the one to read first. Beside it stand checkpoints, checks before training, steps that are not
finite or not guided, logs, and the model card and pushes to the Hub.
"""

from hf_guidance.trainer.guidance_trainer import GUIDE_FOLDER, GuidanceMixin, GuidanceTrainer

__all__ = ["GUIDE_FOLDER", "GuidanceMixin", "GuidanceTrainer"]
