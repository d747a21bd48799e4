"""The part of the trainer that writes the model card with its figures, and scrubs the saved arguments."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.utils.import_utils import is_matplotlib_available

from hf_guidance.analysis.curves import plot_run
from hf_guidance.analysis.heat_maps import plot_similarity_maps
from hf_guidance.analysis.history import validation_curve
from hf_guidance.card.redaction import scrub_arguments
from hf_guidance.card.rendering import render
from hf_guidance.config import GuidanceConfig
from hf_guidance.loss import GuidanceLoss
from hf_guidance.trainer.layer_maps import KeptMap, LayerMaps, can_map, maps_of
from hf_guidance.trainer.run_facts import best_step, given_facts, run_facts
from hf_guidance.trainer.staging import CARD, CURVES, MAPS, without_links
from hf_guidance.trainer.steps import TrainingClock
from hf_guidance.trainer.uploads import ARGUMENTS

if TYPE_CHECKING:
    Behind = Trainer
else:
    Behind = object

logger = logging.getLogger(__name__)

MAPS_SHOW = "Similarity of all layers on rows to validate with, without dropout"


class CardMixin(Behind):
    """The part of `GuidanceMixin` that writes the card, its figures, and arguments without token and paths.

    Attributes:
        card_facts: Facts for the card that the trainer cannot know; see `run_facts`.
        resumed: Whether a call of `train` resumed from a checkpoint.
        layer_maps: Similarities of all layers before training, if the run will be pushed; else None.
    """

    guide: Any
    guidance: GuidanceConfig
    guide_identity: dict[str, Any]

    if TYPE_CHECKING:

        @property
        def guidance_loss(self) -> GuidanceLoss: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.card_facts: dict[str, Any] = {}
        self.resumed = False
        self.layer_maps: LayerMaps | None = None
        super().__init__(*args, **kwargs)
        if not any(isinstance(callback, TrainingClock) for callback in self.callback_handler.callbacks):
            self.add_callback(TrainingClock())
        self._kept_map = KeptMap()
        if self.args.push_to_hub:
            self.add_callback(self._kept_map)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, and remember whether this is a resume: the logged time is then that of the last part only."""
        self.resumed = self.resumed or bool(resume_from_checkpoint)
        wanted = self.args.push_to_hub and self.layer_maps is None and is_matplotlib_available()
        if wanted and self.is_world_process_zero() and can_map(self):
            self._map_before_training(bool(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card to `<output_dir>/README.md`. Without a guide, transformers writes its own card.

        Args:
            language, license, tags, model_name, dataset, dataset_tags, finetuned_from: As in
                `Trainer.create_model_card`.
        """
        folder = Path(str(self.args.output_dir))
        if self.is_world_process_zero():
            without_links(folder, (CARD, CURVES, MAPS))  # writing through a link would change a file elsewhere
        if self.guide is None and not self.card_facts:
            return super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return None
        folder.mkdir(parents=True, exist_ok=True)
        given = given_facts(**kwargs)
        given |= {name: value for name, value in self.card_facts.items() if not given.get(name)}
        facts = run_facts(self, **given)  # gathered before the figures, which take memory and time
        validated = ", validation, and" if validation_curve(self.state.log_history)[1] else " in training, and"
        figures = (
            (CURVES, self._draw_curves, f"Task loss{validated} similarity of every pair"),
            (MAPS, self._draw_maps, f"{MAPS_SHOW}, before training and at step {self._step_of_weights()}"),
        )
        facts["figures"] = [
            {"file": name, "caption": caption} for name, draw, caption in figures if self._drew(draw, folder / name)
        ]
        (folder / CARD).write_text(render(facts), encoding="utf-8")
        return None

    def _map_before_training(self, resumed: bool) -> None:
        try:
            self.layer_maps = maps_of(self)
            if self.layer_maps and not resumed:  # a resumed run has it in the checkpoint
                self.layer_maps.compute(self, "before")
                self._kept_map.before = self.layer_maps.maps["before"]
        except Exception:  # a diagnostic must not prevent training
            logger.exception("The similarities of all layers could not be computed; training begins without them.")

    def _drew(self, draw: Callable[[Path], bool], path: Path) -> bool:
        """Draw a figure if matplotlib is installed, and return whether the file exists."""
        if not is_matplotlib_available():
            return False
        try:
            return draw(path)
        except Exception:  # a card without a figure is better than none
            logger.exception("%s could not be drawn.", path.name)
            return False

    def _step_of_weights(self) -> int:
        """Return the optimizer step that the present weights are from."""
        return best_step(self) or self.state.global_step

    def _draw_curves(self, path: Path) -> bool:
        return plot_run(self.state.log_history, path, self.guidance.measure if self.guide is not None else None)

    def _draw_maps(self, path: Path) -> bool:
        before = self.layer_maps and (self.layer_maps.maps.get("before") or self._kept_map.before)
        if self.layer_maps is None or not before:
            return False
        self.layer_maps.maps["before"] = before
        self.layer_maps.compute(self, "after")
        when = ("before training", f"at step {self._step_of_weights()}")
        return plot_similarity_maps([{"run": "", "similarity_maps": self.layer_maps.maps, "when": when}], path)

    def _try_to_write_a_card(self) -> None:
        try:
            self.create_model_card(model_name=(self.hub_model_id or "").split("/")[-1] or None)
        except Exception:  # a failing card must not lose what was trained
            logger.exception("The model card could not be written. Everything else was saved.")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # the file that transformers writes holds token and paths in clear text
            torch.save(scrub_arguments(self.args), Path(output_dir or str(self.args.output_dir)) / ARGUMENTS)
