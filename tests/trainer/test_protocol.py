"""The protocol of a guided trainer: every one has what the functions of this room ask for."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from builders import arguments, gpt2, llama, token_rows
from torch import nn
from transformers import Trainer

from hf_guidance import GuidanceMixin, GuidanceTrainer
from hf_guidance.trainer.protocol import GuidedTrainer


class Other(Trainer):
    """A Trainer of the user's own."""


class GuidedOther(GuidanceMixin, Other):
    """With guidance."""


MEMBERS = {*GuidedTrainer.__annotations__} | {
    name for name, value in vars(GuidedTrainer).items() if inspect.isfunction(value) or isinstance(value, property)
} - {"__init__", "__subclasshook__"}


def test_the_members_are_found() -> None:
    assert {"guide", "guidance_loss", "is_world_process_zero", "_prepare_inputs"} <= MEMBERS


@pytest.mark.parametrize("guide", [llama(), None], ids=["guided", "unguided"])
@pytest.mark.parametrize("kind", [GuidanceTrainer, GuidedOther])
def test_every_trainer_has_them(kind: type, guide: nn.Module | None, tmp_path: Path) -> None:
    trainer = kind(gpt2(), arguments(tmp_path), train_dataset=token_rows(), guide=guide)
    needs_a_guide = {"guidance_loss", "guide_identity"} if guide is None else set()
    assert {name for name in MEMBERS - needs_a_guide if not hasattr(trainer, name)} == set()
