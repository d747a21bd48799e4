"""The part of a trainer that writes its model card, with curves, and scrubs the arguments that are saved."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.utils.import_utils import is_matplotlib_available

from hf_guidance.analysis.curves import plot_run
from hf_guidance.card_facts import given_facts, run_facts
from hf_guidance.model_card import render
from hf_guidance.scrub import scrub_arguments
from hf_guidance.uploads import ARGUMENTS

logger = logging.getLogger(__name__)

CURVES = "curves.png"


class CardMixin(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """The part of `GuidanceMixin` that saves for others to read: card, curves, arguments without token and paths.

    Attributes:
        card_facts: what the card is to say beside what the trainer knows; see `run_facts`.
        resumed: whether a call of `train` went on from a checkpoint.
    """

    guide: Any
    guidance: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.card_facts: dict[str, Any] = {}
        self.resumed = False
        super().__init__(*args, **kwargs)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; a resume is kept in mind, as the time that is logged is then that of the last part."""
        self.resumed = self.resumed or bool(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card to ``<output_dir>/README.md``; without a guide, transformers' own.

        Args:
            language, license, tags, model_name, dataset, dataset_tags, finetuned_from: as of
                `Trainer.create_model_card`.
        """
        if self.guide is None and not self.card_facts:
            return super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return None
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        given = given_facts(**kwargs)
        given |= {name: value for name, value in self.card_facts.items() if not given.get(name)}
        if self._drew_curves(folder / CURVES):
            given["figures"] = [{"file": CURVES, "caption": "Task loss, validation, and similarity of every pair"}]
        (folder / "README.md").write_text(render(run_facts(self, **given)), encoding="utf-8")
        return None

    def _drew_curves(self, path: Path) -> bool:
        """Draw the run's curves, where matplotlib is installed; whether they are there."""
        if not is_matplotlib_available():
            return False
        try:
            return plot_run(self.state.log_history, path, self.guidance.measure if self.guide is not None else None)
        except Exception:  # a card without a figure is better than none
            logger.exception("The training curves could not be drawn.")
            return False

    def _try_to_write_a_card(self) -> None:
        try:
            self.create_model_card(model_name=(self.hub_model_id or "").split("/")[-1] or None)
        except Exception:  # training goes on, and what is trained is kept, whatever ails a card
            logger.exception("The model card could not be written; everything else was.")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # transformers' own holds token and paths in clear
            torch.save(scrub_arguments(self.args), Path(output_dir or str(self.args.output_dir)) / ARGUMENTS)
