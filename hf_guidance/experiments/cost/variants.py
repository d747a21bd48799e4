"""The variants that are measured in turns: trainers, stepped by their own `train`, and the guide's forward alone."""

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
from hf_guidance.guide.forward import guide_batch
from hf_guidance.trainer.guidance_trainer import GuidanceTrainer


class Steps:
    """A trainer whose steps are timed within its `train`."""

    def __init__(self, trainer: Trainer, discard: int, cycle: int) -> None:
        self.trainer, self.cycle = trainer, cycle
        self.meter = StepMeter(Clock(trainer.args.device), discard)
        for callback in list(trainer.callback_handler.callbacks):
            if isinstance(callback, (PrinterCallback, ProgressCallback)):
                trainer.remove_callback(callback)
        trainer.add_callback(self.meter)
        guided: Any = trainer
        guided.takes_first_look = False  # it would be measured as part of the first step
        compute_loss: Any = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: self.meter.forward(compute_loss, *args, **kwargs)  # type: ignore[method-assign]

    def advance(self, steps: int) -> None:
        """Train for a number of steps and store their times."""
        self._train(steps)
        self.meter.collect(self.cycle)

    def read(self, probe: Probe, steps: int, fetching: bool = False) -> list[float | None]:
        """Return the readings of a probe for each of `steps` counted steps.

        Args:
            probe: Makes the context that reads a step.
            steps: Number of counted steps.
            fetching: Read also the loading of the batches.
        """
        with self.meter.reading(probe, fetching) as readings:
            self._train(self.meter.discard + steps)
        return [reading.value for reading in readings]

    def _train(self, steps: int) -> None:
        self.trainer.args.max_steps = steps
        self.trainer.train()

    def resident(self) -> int:
        """Count the bytes held between steps: weights, optimizer state, weights of the guide."""
        trainer: Any = self.trainer
        states = trainer.optimizer.state.values()
        held = bytes_of(value for state in states for value in state.values() if isinstance(value, torch.Tensor))
        guide = getattr(trainer, "guide", None)
        return held + bytes_of(weights_of(trainer.model)) + (bytes_of(weights_of(guide)) if guide else 0)


class GuideForwards:
    """The forward of the guide alone, as in the guided step."""

    def __init__(self, trainer: GuidanceTrainer, discard: int) -> None:
        self.trainer: Any = trainer
        self.meter = StepMeter(Clock(trainer.args.device), discard)
        self.batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]

    def forward(self, number: int) -> None:
        """Run the guide on one of the batches, counted cyclically."""
        batch = guide_batch(self.batches[number % len(self.batches)], self.trainer.model, self.trainer.guide)
        with torch.no_grad(), self.trainer.accelerator.autocast():
            self.trainer.guidance_loss.forward_guide(batch)

    def advance(self, steps: int) -> None:
        """Run the guide a number of times and store the times."""
        clock, found = self.meter.clock, []
        for number in range(steps):
            began = clock.now()
            self.forward(number)
            found.append((began, clock.now()))
        self.meter.steps += [clock.between(*pair) for pair in found[self.meter.discard :]]

    def read(self, probe: Probe, steps: int, fetching: bool = False) -> list[float | None]:
        """Return the values of a probe for each of `steps` forwards; the batches are already loaded."""
        found = []
        for number in range(steps):
            with probe() as reading:
                self.forward(number)
            found.append(reading.value)
        return found

    def resident(self) -> int:
        """Count the bytes of the guide's weights."""
        return bytes_of(weights_of(self.trainer.guide))

    def largest_layer(self) -> int:
        """Count the bytes of the largest output of a module without children."""
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
    """Make the trainers of a plain run, a guided run and, if asked for, the paper's formulation, from one start.

    Args:
        target: The target, copied for each trainer.
        guide: The guide, shared by the trainers.
        rows: Training rows. The column of sample ids that `guidance` names is added for the guided trainer only.
        args: Training arguments.
        guidance: Settings of the guidance.
        paper: Whether to make the trainer of the paper's formulation.
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
            own.remove_unused_columns = name != "paper"  # the paper's trainer drops the guide's columns itself
            trainers[name] = make(model=copy.deepcopy(target), args=own, train_dataset=data, **more)
    return trainers
