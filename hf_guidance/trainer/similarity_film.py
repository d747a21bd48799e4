"""A film of the similarity of all layers over training."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_guidance.analysis.film import plot_film
from hf_guidance.analysis.history import SimilarityMap
from hf_guidance.trainer.layer_maps import LayerMaps, can_map, maps_of
from hf_guidance.trainer.protocol import GuidedTrainer
from hf_guidance.trainer.steps import TrainingClock


class SimilarityFilm(TrainerCallback, ExportableState):
    """A callback for a GuidanceTrainer that maps the similarity of all layers every few steps, and draws it as a film.

    Each map is of the same batch, and training is the same with and without it. A resumed run keeps its frames.

    Args:
        every: Optimizer steps between two frames. There is one before the first step, and one after the last.
        path: Where to save the film at the end of training: a `.gif` moves, any other format shows some frames. None
            only keeps the frames.
        batch: A collated batch to compare on; the first validation batch if None.

    Attributes:
        frames: Optimizer step → map of all target and guide layers, as `hf_guidance.analysis` draws it.

    Raises:
        ValueError: If `every` is below 1; when training begins, if there is no guide or no batch to compare on.

    Example:
        >>> film = SimilarityFilm(every=20, path="film.gif")
        >>> trainer = GuidanceTrainer(model=target, guide=guide, callbacks=[film])  # doctest: +SKIP
    """

    def __init__(
        self, every: int, path: str | os.PathLike[str] | None = None, batch: dict[str, Tensor] | None = None
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; a film needs a frame every 1 or more optimizer steps.")
        self.every, self.path, self.batch = every, path, batch
        self.frames: dict[int, SimilarityMap] = {}
        self._maps: LayerMaps | None = None
        self._trainer: GuidedTrainer | None = None

    def begin(self, trainer: GuidedTrainer) -> None:
        """Take hold of the trainer that this callback belongs to. `GuidanceTrainer` calls this.

        Raises:
            ValueError: If its networks cannot be compared.
        """
        if not can_map(trainer):
            raise ValueError(
                "SimilarityFilm compares all layers of target and guide in one process, but this run has no guide with "
                "a weight, or its networks are sharded, or the target sees each text by itself: leave the film out."
            )
        self._maps = maps_of(trainer) if self.batch is None else LayerMaps(self.batch)
        if self._maps is None:
            raise ValueError(
                "SimilarityFilm compares on the first validation batch, but there is no eval_dataset that is read by "
                "number, or its batch is too small for the measure: pass batch=, a collated batch."
            )
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        callbacks: Any = state.stateful_callbacks  # annotated as a list, and is a dict
        saved = callbacks.setdefault(type(self).__name__, self.state())
        kept = (saved[-1] if isinstance(saved, list) else saved)["attributes"]["frames"]
        self.frames = {int(step): found for step, found in kept.items()} if state.global_step else {}

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self._add(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._add(state)
        if self.path is not None and state.is_world_process_zero:
            plot_film(self.frames, self.path)
        self._trainer = None

    def _add(self, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        if self._trainer is None or self._maps is None:
            raise ValueError("SimilarityFilm needs a guide: give it to a GuidanceTrainer that has one.")
        clocks = [cb for cb in self._trainer.callback_handler.callbacks if isinstance(cb, TrainingClock)]
        with clocks[0].paused() if clocks else nullcontext():
            self._maps.compute(self._trainer, "now")
        self.frames[state.global_step] = self._maps.maps["now"]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the frames so far."""
        return {"args": {}, "attributes": {"frames": {str(step): found for step, found in self.frames.items()}}}
