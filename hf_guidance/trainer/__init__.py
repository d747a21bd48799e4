"""The Trainer with a guidance loss, and what a run needs around it.

Read `guidance_mixin` first. The other files hold checkpoints, checks before training, logs, steps that are not finite
or not guided, the end of guidance at a similarity, similarities on validation data, a film of them, the model card, and
pushes to the Hub.
"""

from hf_guidance.trainer.checkpoints import last_complete_checkpoint
from hf_guidance.trainer.checks import check_machine, check_settings
from hf_guidance.trainer.clock import Clock, TrainingClock
from hf_guidance.trainer.environment import usable_cpus
from hf_guidance.trainer.forwards import watch_each
from hf_guidance.trainer.guidance_mixin import GUIDE_FOLDER, GuidanceMixin
from hf_guidance.trainer.guidance_trainer import GuidanceTrainer
from hf_guidance.trainer.layer_maps import LayerMaps, can_map
from hf_guidance.trainer.protocol import GuidedTrainer
from hf_guidance.trainer.run_facts import command_facts
from hf_guidance.trainer.similarity_film import SimilarityFilm
from hf_guidance.trainer.staging import CARD, CURVES, STAGING, complete, files_in, make_empty, put, without_links
from hf_guidance.trainer.uploads import check_hub, push_staged, upload_command

__all__ = [
    "CARD",
    "CURVES",
    "GUIDE_FOLDER",
    "STAGING",
    "Clock",
    "GuidanceMixin",
    "GuidanceTrainer",
    "GuidedTrainer",
    "LayerMaps",
    "SimilarityFilm",
    "TrainingClock",
    "can_map",
    "check_hub",
    "check_machine",
    "check_settings",
    "command_facts",
    "complete",
    "files_in",
    "last_complete_checkpoint",
    "make_empty",
    "push_staged",
    "put",
    "upload_command",
    "usable_cpus",
    "watch_each",
    "without_links",
]
