"""One similarity over all micro-batches of an optimizer step, though only one of them fits at a time with its graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from hf_guidance.features.reader import HIDDEN, not_recomputed
from hf_guidance.features.rows import Batch
from hf_guidance.guide.inputs import check_vocabularies, guide_batch, with_decoder_inputs, without_guide
from hf_guidance.loss import GuidanceLoss, Watched
from hf_guidance.similarity.representation import Kernel, complete

if TYPE_CHECKING:
    from hf_guidance.features.samples import Samples

NO_LABEL = -100


class Accumulated:
    """The guidance loss over micro-batches as over one batch, gradients included, at one more forward of the target.

    First all micro-batches go through both networks without gradients, and their features are kept. Then each goes
    through the target again, with the same dropout: in the Gram matrices its own features have their gradient, and the
    others are constants. The sum over the micro-batches is the gradient of the whole. The Gram matrices of the whole
    are computed for each of them. Batch norm and what else looks at a batch sees micro-batches all the same.

    Args:
        loss: of the target, the guide and the config.
        batches: the micro-batches; sequences of several lengths need an ``attention_mask``.
        step: the optimizer step.
        rank: whose micro-batches they are.
        leave_out: columns that the target is not run on.

    Raises:
        ValueError: a target with LayerDrop, which skips other layers in each micro-batch.

    Source: the replay of gradients is Gao et al. 2021 (arXiv 2101.06983), who do so for contrastive losses.

    Example:
        >>> window = Accumulated(guidance, micro_batches, step=step)  # doctest: +SKIP
        >>> for number, batch in enumerate(micro_batches):  # doctest: +SKIP
        ...     with window.watch(number) as watched:
        ...         outputs = target(**watched.inputs)
        ...     (watched.total(outputs.loss) / len(micro_batches)).backward()
    """

    def __init__(
        self,
        loss: GuidanceLoss,
        batches: Sequence[Batch],
        *,
        step: int = 0,
        rank: int = 0,
        leave_out: Collection[str] = (),
    ) -> None:
        loss.target_reader.layer_drop.check_similarity_batch("accumulated")
        self.loss, self.batches, self.weights = loss, batches, loss.weights(step)
        self._leave_out = leave_out
        self._states: list[list[Tensor]] = []
        if not self.weights.guidance:
            return
        if loss.pairs is None and not loss.config.guide_shares_tokenizer:
            check_vocabularies(loss.target, loss.guide, batches[0])
        seen = [with_decoder_inputs(batch, loss.target) for batch in batches]
        guides = [guide_batch(batch, loss.target) for batch in batches]
        self._samples = loss.samples_of(joined(seen), step=step, rank=rank)
        self._guide_samples = loss.samples_of(joined(guides), like=self._samples)
        with torch.no_grad():
            grams = _grams([loss.running.read(batch, _kept) for batch in guides], self._guide_samples)
            self._guide_grams = complete(grams)
            self._features = self._look(seen)

    @contextmanager
    def watch(self, number: int, log: bool = True) -> Iterator[Watched]:
        """As `GuidanceLoss.watch`, of one of the micro-batches; they come in their order, once each.

        The similarities are those of all of them, and so is the loss; its gradient is this micro-batch's part, times
        the number of micro-batches, for a mean over these.
        """
        loss, inputs = self.loss, without_guide(self.batches[number], self.loss.config.sample_id_column)
        watched = Watched(inputs, self.weights)
        if not self.weights.guidance:
            yield watched
            return

        def gram(name: str, features: Tensor) -> Kernel:
            others = [features if i == number else read[name] for i, read in enumerate(self._features)]
            return self._samples.gram(name, _in_one(others))

        _set_random_state(self._states[number])
        with loss.target_reader.reading(not_recomputed(gram)) as grams:
            yield watched
        scale = len(self.batches)
        loss.compare(watched, (self._samples, grams), (self._guide_samples, self._guide_grams), log=log, scale=scale)

    def _look(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """What the target's layers show of each micro-batch, and with which random state; no buffer moves."""
        target, found = self.loss.target, []
        buffers = [(buffer, buffer.clone()) for buffer in target.buffers()]
        for batch in batches:
            self._states.append(_random_state())
            inputs = without_guide(batch, self.loss.config.sample_id_column)
            inputs = {name: value for name, value in inputs.items() if name not in self._leave_out}
            with self.loss.autocast(), self.loss.target_reader.reading(_kept) as read:
                target(**inputs)
            found.append(read)
        for buffer, before in buffers:
            buffer.copy_(before)
        return found


def joined(batches: Sequence[Batch]) -> dict[str, Any]:
    """Micro-batches as one batch, rows padded to the longest; only the tensors of them.

    Raises:
        ValueError: micro-batches with other columns, or of several lengths and without a mask.
    """
    first = batches[0]
    if any(batch.keys() != first.keys() for batch in batches):
        raise ValueError(f"the micro-batches have columns of their own: {[sorted(batch) for batch in batches]}.")
    columns: dict[str, list[Any]] = {name: [batch[name] for batch in batches] for name in first}
    tensors = {name: parts for name, parts in columns.items() if isinstance(parts[0], Tensor)}
    tensors = {name: parts for name, parts in tensors.items() if parts[0].ndim}
    ragged = {name for name, parts in tensors.items() if len({part.shape[1:2] for part in parts}) > 1}
    of_decoder = {name for name in ragged if name.startswith("decoder_") or name == "labels"}
    unknown = set() if "attention_mask" in tensors else ragged - of_decoder
    if "decoder_input_ids" in ragged and not {"decoder_attention_mask", "labels"} & tensors.keys():
        unknown |= of_decoder
    if unknown:
        raise ValueError(
            f"the micro-batches differ in the length of {sorted(unknown)} and have no attention_mask: which positions "
            "are padding is not known. Add a mask, or pad to a fixed length; rows of packed documents need "
            "similarity_batch='local'."
        )
    return {name: _in_one(parts, NO_LABEL * (name == "labels")) for name, parts in tensors.items()}


def _in_one(parts: Sequence[Tensor], fill: float = 0) -> Tensor:
    """Along the first axis, the second padded to the longest."""
    length = max((part.shape[1] for part in parts if part.ndim > 1), default=0)
    return torch.cat([_padded(part, length, fill) for part in parts])


def _padded(part: Tensor, length: int, fill: float) -> Tensor:
    if part.ndim < 2 or part.shape[1] == length:
        return part
    rest = part.new_full((part.shape[0], length - part.shape[1], *part.shape[2:]), fill)
    return torch.cat([part, rest], 1)


def _kept(name: str, features: Tensor) -> Tensor:
    """A copy of what may be overwritten."""
    return features.detach() if HIDDEN.fullmatch(name) else features.detach().clone()


def _grams(read: Sequence[Mapping[str, Tensor]], samples: Samples) -> dict[str, Kernel]:
    return {name: samples.gram(name, _in_one([features[name] for features in read])) for name in read[0]}


def _devices() -> list[Any]:
    """torch's modules of the devices with a random state of their own."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [torch] if accelerator is None else [torch, torch.get_device_module(accelerator)]


def _random_state() -> list[Tensor]:
    return [device.get_rng_state() for device in _devices()]


def _set_random_state(state: Sequence[Tensor]) -> None:
    for device, own in zip(_devices(), state, strict=True):
        device.set_rng_state(own)


def check_accumulates(args: TrainingArguments, sharded: bool) -> None:
    """Raise ValueError where micro-batches cannot be looked at before they are trained on."""
    if sharded:
        raise ValueError(
            "similarity_batch='accumulated' runs the target outside of training too, which FSDP and DeepSpeed do not "
            "allow: use 'global' over more processes, or DDP."
        )
    if args.torch_compile:
        raise ValueError(
            "similarity_batch='accumulated' needs the same dropout in two forwards, and torch_compile draws its own: "
            "leave one of the two out."
        )
    if args.gradient_accumulation_steps < 2:
        raise ValueError(
            "similarity_batch='accumulated' is over the micro-batches of a step, and gradient_accumulation_steps is "
            f"{args.gradient_accumulation_steps}: set it to 2 or more, or use 'local', which is the same for one."
        )
