"""What is measured in turns: trainers, stepped by their own `train`, and the guide's forward alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hf_guidance.config import GuidanceConfig
from hf_guidance.experiments.cost.meters import Clock, Probe, StepMeter, bytes_of, weights_of
from hf_guidance.experiments.cost.paper_formulation import PaperTrainer
from hf_guidance.experiments.cost.random_rows import RandomRows
from hf_guidance.guide.inputs import guide_batch
from hf_guidance.trainer.guidance_trainer import GuidanceTrainer


class Steps:
    """A trainer, its steps timed as `train` takes them."""

    def __init__(self, trainer: Trainer, discard: int, cycle: int) -> None:
        self.trainer, self.cycle = trainer, cycle
        self.meter = StepMeter(Clock(trainer.args.device), discard)
        for callback in list(trainer.callback_handler.callbacks):
            if isinstance(callback, (PrinterCallback, ProgressCallback)):
                trainer.remove_callback(callback)
        trainer.add_callback(self.meter)
        compute_loss: Any = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: self.meter.forward(compute_loss, *args, **kwargs)  # type: ignore[method-assign]

    def advance(self, steps: int) -> None:
        self._train(steps)
        self.meter.collect(self.cycle)

    def read(self, probe: Probe, steps: int, fetching: bool = False) -> list[float | None]:
        """What a probe tells of each of so many counted steps, and of the fetching of their batches."""
        with self.meter.reading(probe, fetching) as readings:
            self._train(self.meter.discard + steps)
        return [reading.value for reading in readings]

    def _train(self, steps: int) -> None:
        self.trainer.args.max_steps = steps
        self.trainer.train()

    def resident(self) -> int:
        """Bytes held between steps: weights, optimizer state, the guide's weights."""
        trainer: Any = self.trainer
        states = trainer.optimizer.state.values()
        held = bytes_of(value for state in states for value in state.values() if isinstance(value, torch.Tensor))
        guide = getattr(trainer, "guide", None)
        return held + bytes_of(weights_of(trainer.model)) + (bytes_of(weights_of(guide)) if guide else 0)


class GuideForwards:
    """The forward of the guide alone, as the guided step makes it."""

    def __init__(self, trainer: GuidanceTrainer, discard: int) -> None:
        self.trainer: Any = trainer
        self.meter = StepMeter(Clock(trainer.args.device), discard)
        self.batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]

    def forward(self, number: int) -> None:
        batch = guide_batch(self.batches[number % len(self.batches)], self.trainer.model)
        with torch.no_grad(), self.trainer.accelerator.autocast():
            self.trainer.guidance_loss.forward_guide(batch)

    def advance(self, steps: int) -> None:
        clock, found = self.meter.clock, []
        for number in range(steps):
            began = clock.now()
            self.forward(number)
            found.append((began, clock.now()))
        self.meter.steps += [clock.between(*pair) for pair in found[self.meter.discard :]]

    def read(self, probe: Probe, steps: int, fetching: bool = False) -> list[float | None]:
        """What a probe tells of each of so many forwards, whose batches have been fetched."""
        found = []
        for number in range(steps):
            with probe() as reading:
                self.forward(number)
            found.append(reading.value)
        return found

    def resident(self) -> int:
        return bytes_of(weights_of(self.trainer.guide))

    def largest_layer(self) -> int:
        """Bytes of the largest output of a module without children."""
        sizes: list[int] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                sizes.append(bytes_of([output]))

        leaves = [module for module in self.trainer.guide.modules() if not list(module.children())]
        handles = [leaf.register_forward_hook(note) for leaf in leaves]
        self.forward(0)
        for handle in handles:
            handle.remove()
        return max(sizes, default=0)


def make_trainers(
    target: PreTrainedModel,
    guide: nn.Module,
    rows: RandomRows,
    args: TrainingArguments,
    guidance: GuidanceConfig,
    *,
    paper: bool = True,
) -> dict[str, Trainer]:
    """The trainers of a plain run, of a guided one and, if asked for, of the paper's formulation, from one start.

    Args:
        target: copied for each.
        rows: a column that `guidance` names for the samples' ids is added for the guided trainer alone.
    """
    column = getattr(guidance, "sample_id_column", None)
    numbered = rows.with_ids(column) if column else rows
    makers: dict[str, tuple[Callable[..., Trainer], Any, dict[str, Any]]] = {
        "plain": (Trainer, rows, {}),
        "guided": (GuidanceTrainer, numbered, {"guide": guide, "guidance": guidance}),
        "paper": (PaperTrainer, rows, {"guide": guide, "guidance": guidance}),
    }
    trainers = {}
    for name, (make, data, more) in makers.items():
        if name != "paper" or paper:
            own = copy.copy(args)
            own.save_strategy = own.eval_strategy = "no"
            own.disable_tqdm, own.max_steps = True, 1
            own.remove_unused_columns = name != "paper"  # the paper's trainer drops the guide's own itself
            trainers[name] = make(model=copy.deepcopy(target), args=own, train_dataset=data, **more)
    return trainers
