"""The Trainer with a guidance loss, and what a run needs around it.

Read `guidance_mixin` first. `micro_batches` watches the target; `steps` checks each optimizer step and keeps its logs
and its time. `checks` and `first_look` come before the training, `evaluation` and `similarity_stop` in it, and
`checkpoints` resume it. `run_facts` gathers what `card_mixin` writes and `hub_mixin` pushes.
"""

from hf_guidance.trainer.checkpoints import last_complete_checkpoint
from hf_guidance.trainer.checks import check_machine, check_settings, check_writable, makes_batches
from hf_guidance.trainer.environment import usable_cpus
from hf_guidance.trainer.first_look import unchanged
from hf_guidance.trainer.forwards import watch_each, watches_each
from hf_guidance.trainer.gradient_angle import Gradients, gradients_of
from hf_guidance.trainer.guidance_mixin import GUIDE_FOLDER, GuidanceMixin
from hf_guidance.trainer.guidance_trainer import GuidanceTrainer
from hf_guidance.trainer.layer_maps import LayerMaps, can_map
from hf_guidance.trainer.preparation import first_batches
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
    "Gradients",
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
    "check_writable",
    "command_facts",
    "complete",
    "files_in",
    "first_batches",
    "gradients_of",
    "last_complete_checkpoint",
    "make_empty",
    "makes_batches",
    "push_staged",
    "put",
    "unchanged",
    "upload_command",
    "usable_cpus",
    "watch_each",
    "watches_each",
    "without_links",
]
