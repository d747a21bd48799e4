"""The Trainer with a guidance loss, and what a run needs around it.

Read `guidance_mixin` first. `micro_batches` watches the target, and `steps` keeps what an optimizer step leaves behind.
`checks` looks at the settings before training, `first_look` at the first batch; `similarity_stop` ends guidance.
`evaluation` compares on validation data; `checkpoints` resumes; the `…_mixin`s write cards and push to the Hub.
"""

from hf_guidance.trainer.checkpoints import last_complete_checkpoint
from hf_guidance.trainer.checks import check_machine, check_settings
from hf_guidance.trainer.environment import usable_cpus
from hf_guidance.trainer.forwards import watch_each
from hf_guidance.trainer.guidance_mixin import GUIDE_FOLDER, GuidanceMixin
from hf_guidance.trainer.guidance_trainer import GuidanceTrainer
from hf_guidance.trainer.layer_maps import LayerMaps, can_map
from hf_guidance.trainer.protocol import GuidedTrainer
from hf_guidance.trainer.run_facts import command_facts
from hf_guidance.trainer.similarity_film import SimilarityFilm
from hf_guidance.trainer.staging import CARD, CURVES, STAGING, complete, files_in, make_empty, put, without_links
from hf_guidance.trainer.steps import Clock, TrainingClock
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
