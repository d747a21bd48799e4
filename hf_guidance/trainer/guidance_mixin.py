"""`GuidanceMixin`: a guidance loss for any Trainer class."""

from __future__ import annotations

import inspect
import logging
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_guidance.analysis.first_batch import FirstLook
from hf_guidance.config import GuidanceConfig
from hf_guidance.features.batch import Batch
from hf_guidance.features.inside import check_is_network, transformer_in
from hf_guidance.guide.forward import accepted_columns
from hf_guidance.guide.freezing import calibrate_batch_norm, check_types, freeze
from hf_guidance.guide.identity import identity
from hf_guidance.guide.inputs import GUIDE_PREFIX
from hf_guidance.guide.own_base import OwnBase, load_guide_of_base
from hf_guidance.guide.sharding import check_whole
from hf_guidance.loss import GuidanceLoss, Watched
from hf_guidance.schedule import Schedule, Weights
from hf_guidance.trainer.checkpoints import ResumingMixin, check_goes_on, checkpoint_to_resume, guided_steps_of
from hf_guidance.trainer.checks import check_is_arguments, check_output, check_trainer
from hf_guidance.trainer.evaluation import EvaluationMixin
from hf_guidance.trainer.first_look import take_first_look
from hf_guidance.trainer.gradient_angle import note_gradients
from hf_guidance.trainer.hub_mixin import PublishingMixin
from hf_guidance.trainer.logs import short_form_of
from hf_guidance.trainer.micro_batches import MicroBatchesMixin
from hf_guidance.trainer.not_finite import GRADIENT, guide_layers_to_check
from hf_guidance.trainer.preparation import calibrate, open_cache, save_guide
from hf_guidance.trainer.similarity_film import SimilarityFilm
from hf_guidance.trainer.similarity_stop import SimilarityStop, StoppingMixin
from hf_guidance.trainer.steps import FiniteSteps, GuidedSteps, RunningMeans
from hf_guidance.trainer.streams import StreamsMixin, pass_of, warn_of_stream

logger = logging.getLogger(__name__)

GUIDE_FOLDER = "guide"


class GuidanceMixin(PublishingMixin, ResumingMixin, StreamsMixin, StoppingMixin, EvaluationMixin, MicroBatchesMixin):
    """A mixin in front of a Trainer class that adds a guidance loss to its task loss and leaves the rest unchanged.

    Args:
        guide: The frozen network, from `load_guide` or any `nn.Module`; None trains without guidance. `"base"` is the
            target's own base, for a target with PEFT's adapters (see `load_guide_of_base`).
        guidance: Settings of the guidance; None takes the defaults of `GuidanceConfig`. Without guide and settings,
            the Trainer also treats losses that are not finite as it does by itself.
        *args, **kwargs: Arguments of the Trainer.

    Attributes:
        first_look: The look at the first batch, once training has begun; None if none was taken.
        takes_first_look: Whether to take and print one, as each class or trainer may set.

    Raises:
        ValueError: At construction, if guidance would not do what its settings say.
    """

    def __init__(
        self,
        *args: Any,
        guide: nn.Module | Literal["base"] | None = None,
        guidance: GuidanceConfig | None = None,
        **kwargs: Any,
    ) -> None:
        check_types(guide, guidance, or_base=True)
        given = dict(zip(("model", "args"), args, strict=False)) | kwargs
        if isinstance(given.get("model"), type):
            check_is_network(given["model"], "model")
        check_is_arguments(kwargs.get("args"))
        if isinstance(given.get("args"), TrainingArguments):
            check_output(given["args"])
        super().__init__(*args, **kwargs)
        self.guide: Any = guide
        if guide is not None:
            target = self._guidance_target()
            self.guide = guide = (
                load_guide_of_base(target) if isinstance(guide, str) else transformer_in(guide, "guide")
            )
        self.guidance = (guidance or GuidanceConfig()).resolved()
        self.first_look: FirstLook | None = None
        self._loss: GuidanceLoss | None = None
        self._sums = RunningMeans()
        skip = self.guidance.on_non_finite == "skip"
        threshold = self.guidance.guidance_stop_similarity
        self._finite = FiniteSteps(self.accelerator, self._sums, skip)
        self._is_calibrated = False
        self._has_settings = guide is not None or guidance is not None  # else all is as Trainer does it
        if self._has_settings:
            self.add_callback(self._finite)
        if guide is None:
            return
        check_trainer(self)
        self._guided = GuidedSteps(self._begin_training, self._schedule, lambda: self._finite.left_out)
        if threshold is not None:
            self.add_callback(SimilarityStop(threshold))
        self.add_callback(self._guided)
        check_whole(guide)
        shared = self.guidance.shard_guide and self.args.world_size > 1  # then no device may hold the whole guide
        freeze(guide, self.guidance.guide_batch_norm, None if shared else self.accelerator.device)
        if self._calibrates():
            calibrate_batch_norm(guide, ())  # clears the statistics, which are no part of the identity
        self.guide_identity = identity(guide)
        if self.guidance.guidance_weight:
            _ = self.guidance_loss  # resolves the layers now, so that a wrong name raises here
        for callback in list(self.callback_handler.callbacks):
            if short := short_form_of(callback):
                self.remove_callback(callback)
                self.add_callback(short)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = _signature(cls)  # type: ignore[attr-defined]

    # ---------------------------------------------------------------------------------------------------- the loss

    @property
    def guidance_loss(self) -> GuidanceLoss:
        """Return the loss for the model that is being trained, rebuilt whenever `model_init` makes a new model."""
        target = self._guidance_target()
        if self._loss is None or self._loss.target is not target:
            if self._loss is not None:
                self._loss.close()
            if isinstance(self.guide, OwnBase) and not self.guide.is_of(target):  # of the model before this one
                self.guide = load_guide_of_base(target)
                self.guide_identity = identity(self.guide)
            autocast = self.accelerator.autocast
            self._loss = GuidanceLoss(target, self.guide, self.guidance, seed=self.args.seed, autocast=autocast)
        if self._stop is not None:
            self._loss.stopped_at = self._stop.stopped_at
        return self._loss

    def _schedule(self) -> Schedule:
        if not self.guidance.guidance_weight:  # then no layer is looked for
            return lambda step: Weights(0.0, 1.0)
        self.guidance_loss.total_steps = self.state.max_steps
        return self.guidance_loss.schedule()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Compute the task loss, plus the weighted guidance loss while training."""
        kwargs = {"num_items_in_batch": num_items_in_batch}
        if self.guide is None or not self.guidance.guidance_weight or not model.training:
            found = super().compute_loss(model, self._for_target(inputs), return_outputs=return_outputs, **kwargs)
            if model.training:
                task_loss = found[0] if isinstance(found, tuple) else found
                self._finite.expect_finite({"task loss": task_loss.detach()}, "")
                if self._has_settings:
                    self._note_task_loss(task_loss, num_items_in_batch)
                self._finite.check_before_backward(self.state)
            return found
        with self._watch(inputs) as watched:
            found = super().compute_loss(model, watched.inputs, return_outputs=return_outputs, **kwargs)
        task_loss, outputs = found if isinstance(found, tuple) else (found, None)
        loss = self._add_guidance(task_loss, watched, num_items_in_batch)
        if self.guidance.log_gradients and self._micro_step[1] == 0:
            note_gradients(self, self._finite.sums, model, task_loss, watched)
        self._finite.check_before_backward(self.state)
        if watched.layers is not None:
            self._look_is_due = watched.loss is None
            self.first_look = take_first_look(self, model, inputs, task_loss, watched, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _add_guidance(self, task_loss: Tensor, watched: Watched, num_items: Tensor | int | None) -> Tensor:
        steps = getattr(self, "current_gradient_accumulation_steps", 1)
        task_is_scaled = self._note_task_loss(task_loss, num_items)
        sums, compared = self._finite.sums, watched.similarities.get(self.guidance.measure, {})
        has_to_be_finite = {} if watched.layers is None else guide_layers_to_check(watched.layers[1])
        has_to_be_finite |= {"task loss": task_loss.detach()}
        has_to_be_finite |= {f"{self.guidance.measure} of {pair}": value for pair, value in compared.items()}
        self._finite.expect_finite(has_to_be_finite, f"micro-step {self._micro_step[1]}" if steps > 1 else "")
        sums.add("guidance/weight", 0.0 if watched.loss is None else watched.weights.guidance)
        self._guided.note(watched, self.state.global_step)
        if watched.skipped_pairs:
            sums.add("guidance/skipped_pairs", watched.skipped_pairs, 0)
        if watched.loss is None:
            if watched.weights.guidance:
                sums.add("guidance/skipped_batches", 1.0, 0)
            return watched.total(task_loss)
        sums.add("guidance/loss", watched.loss.detach() * watched.rows, watched.rows)
        if self._stop is not None:
            self._stop.note(compared.values(), watched.rows)
        if compared:
            sums.add("guidance/similarity", torch.stack(list(compared.values())).mean() * watched.rows, watched.rows)
        for measure, similarities in watched.similarities.items():
            group = "similarity" if measure == self.guidance.measure else measure
            for pair, value in similarities.items():
                sums.add(f"guidance/{group}/{pair}", value * watched.rows, watched.rows)
        if self._rows is not None:  # so that all rows of the step weigh alike
            watched.loss = watched.loss * (watched.rows / self._rows)
        if task_is_scaled:  # then Trainer does not divide by the accumulation steps
            watched.loss = watched.loss / steps
        return watched.total(task_loss)

    def _note_task_loss(self, task_loss: Tensor, num_items: Tensor | int | None) -> bool:
        """Log the task loss of a micro-step by itself, and return whether it is scaled as `_loss_is_scaled` tells."""
        steps, is_scaled = getattr(self, "current_gradient_accumulation_steps", 1), self._loss_is_scaled(num_items)
        self._finite.sums.add("task/loss", task_loss.detach() / (1 if is_scaled else steps), 1 / steps)
        return is_scaled

    def _loss_is_scaled(self, num_items: Tensor | int | None) -> bool:
        """Tell whether Trainer takes the task loss as already divided by the accumulation steps (its own condition)."""
        declared = getattr(self, "loss_is_scaled_for_ga", None)
        if declared is not None and hasattr(Trainer, "loss_is_scaled_for_ga"):  # earlier ones do not ask for it
            return declared
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaler = self.accelerator.scaler
        if norm is not None and (scaler is None or scaler.get_scale() <= 1):  # else the loss scaler may repair it
            self._finite.expect_finite({GRADIENT: norm}, "")
        return norm

    # ----------------------------------------------------------------------------------------- around the training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does, after checks of the checkpoint and preparation of the guide.

        Args:
            resume_from_checkpoint: Folder of a checkpoint; True takes the last complete one.
            *args, **kwargs: Arguments of `Trainer.train`.

        Raises:
            ValueError: If the checkpoint is incomplete, or has other settings or another guide.
            FloatingPointError: If a loss is not finite and `on_non_finite` is `stop`.
            RuntimeError: If no step was guided that should have been.
        """
        alone = self.guide is None
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir), weights_suffice=alone)
        if checkpoint:
            warn_of_stream(checkpoint, self.args, self.train_dataset)
            identity_now = None if self.guide is None else self.guide_identity
            check_goes_on(checkpoint, self.args, self.guidance, identity_now)
        if self.guide is not None:
            self._guided.before = guided_steps_of(checkpoint)
        self._sums.clear()  # an interrupted call may have left some
        self._micro_step, self._pass, self._pass_at_start = (-1, 0), None, pass_of(checkpoint)
        self._is_calibrated = False  # the data may be others
        try:
            if self.model_init is None:  # else the target is made later
                self._prepare_guide()
            found = super().train(checkpoint, *args, **kwargs)
        finally:
            self._forget_batches()
            self._let_go()
        if self.guide is not None and self.guidance.guidance_weight:
            folder = str(self.args.output_dir)
            self._guided.check_any(self.state, partial(self.save_model, folder, _internal_call=True), folder)
        return found

    def _prepare_guide(self) -> None:
        self._calibrate_once()
        if self.guide is not None and self.guidance.cache_guide and self.guidance.guidance_weight:
            open_cache(self)
        if self.guide is not None and self.guidance.save_guide:
            save_guide(self, Path(str(self.args.output_dir)) / GUIDE_FOLDER)

    def _begin_training(self) -> None:
        check_trainer(self)
        self._look_is_due = not self.state.global_step
        had_stop = self._stop is not None
        self._find_stop()
        if had_stop and self._stop is None and self._loss is not None:
            self._loss.stopped_at = None  # the callback was removed
        self._finite.on_taken = None if self._stop is None else self._stop.take
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SimilarityFilm):
                callback.begin(self)
        if self.model_init is not None:
            self._prepare_guide()
        if self.guidance.guidance_weight:
            self.guidance_loss.attach()  # before the first forward, which torch.compile traces

    def _let_go(self) -> None:
        """Take the hooks off both networks; the next step or evaluation that needs them puts them back."""
        if self._loss is not None:
            self._loss.close()

    def _calibrates(self) -> bool:
        return self.guidance.guide_batch_norm == "calibrated" and self.guidance.guidance_weight > 0

    def _calibrate_once(self) -> None:
        if self.guide is not None and self._calibrates() and not self._is_calibrated:
            calibrate(self)
            self._is_calibrated = True

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if getattr(self, "guide", None) is not None:
            ids = self.guidance.sample_id_column
            own = [GUIDE_PREFIX + name for name in accepted_columns(self.guide)] + ([ids] if ids else [])
            columns: Any = self._signature_columns  # annotated as None, and is a list by now
            columns += [name for name in own if name not in columns]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.guide is not None and self.args.should_save:
            self.guidance.save(output_dir or str(self.args.output_dir), self.guide_identity)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # every rank logs at the same steps, so that the reduction is collective
        if "loss" in logs and self._has_settings:
            logs |= self._sums.drain(self.accelerator)
            logs |= self._stop.to_log() if self._stop is not None else {}
        super().log(logs, start_time)


def _signature(cls: type) -> inspect.Signature:
    """Make the signature that `help` shows: the Trainer's behind the mixin, with `guide` and `guidance`."""
    written = next(base for base in cls.__mro__ if "__init__" in vars(base) and base not in GuidanceMixin.__mro__)
    parameters = list(inspect.signature(vars(written)["__init__"]).parameters.values())[1:]
    if not issubclass(written, GuidanceMixin):
        own = inspect.signature(GuidanceMixin.__init__).parameters
        place = len(parameters) - any(p.kind is p.VAR_KEYWORD for p in parameters)
        parameters[place:place] = own["guide"], own["guidance"]
    return inspect.Signature(parameters)
