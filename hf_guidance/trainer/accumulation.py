"""One similarity over all micro-batches of an optimizer step, with the activations of one micro-batch in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from hf_guidance.features.batch import Batch
from hf_guidance.features.reader import HIDDEN
from hf_guidance.guide.forward import guide_batch, seen_by_target, without_guide
from hf_guidance.guide.inputs import NO_LABEL, check_vocabularies
from hf_guidance.guide.random_state import random_state, set_random_state
from hf_guidance.loss import GuidanceLoss, Watched
from hf_guidance.schedule import Weights
from hf_guidance.similarity.layers import Layer
from hf_guidance.similarity.pair_loss import Groups

if TYPE_CHECKING:
    from hf_guidance.features.samples import Samples


class Accumulated:
    """The guidance loss over all micro-batches of a step, with its exact gradient, at one more forward of the target.

    First, all micro-batches run through both networks without gradients, and their features are kept. Then each
    micro-batch runs through the target again, with the same dropout. In each layer its own features carry a
    gradient, and those of the others are constants. The sum over the micro-batches is the gradient of the whole. The
    layers of the whole are made once per micro-batch. Batch norm still sees single micro-batches.

    Args:
        loss: The guidance loss; it holds target, guide and config.
        batches: The micro-batches; sequences of different lengths need an `attention_mask`.
        step: Number of the optimizer step, from 0.
        rank: Rank of the process that holds the micro-batches.
        leave_out: Columns that the target does not receive.
        weights: Weights of guidance and task to use instead of those of the step.

    Raises:
        ValueError: If the target has LayerDrop, which skips different layers in each micro-batch.

    Source: Gao et al. 2021 (arXiv 2101.06983) replay gradients in this way for contrastive losses.

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
        weights: Weights | None = None,
    ) -> None:
        loss.target_reader.layer_drop.check_similarity_batch("accumulated")
        self.loss, self.batches, self.weights = loss, batches, weights or loss.weights(step)
        self._leave_out = leave_out
        self._states: list[list[Tensor]] = []
        if not self.weights.guidance:
            return
        if loss.pairs is None and not loss.config.guide_shares_tokenizer:
            check_vocabularies(loss.target, loss.guide, batches[0])
        seen = [seen_by_target(batch, loss.target) for batch in batches]
        self._samples = loss.samples_of(joined(seen), step=step, rank=rank)
        with torch.no_grad():
            self._guide = self._run_guide()
            self._features = self._run_ahead(seen)

    @contextmanager
    def watch(self, number: int, log: bool = True) -> Iterator[Watched]:
        """Watch the forward of one micro-batch, as `GuidanceLoss.watch` does. Call it for each in order, once.

        Similarities and loss are those of all micro-batches together. The gradient is the part of this micro-batch
        times the number of micro-batches, so that the mean over micro-batches is the whole gradient.
        """
        loss, inputs = self.loss, without_guide(self.batches[number], self.loss.config.sample_id_column)
        watched = Watched(inputs, self.weights)
        if not self.weights.guidance:
            yield watched
            return

        def layers_of(name: str, features: Tensor) -> tuple[Layer, ...]:
            others = [features if i == number else read[name] for i, read in enumerate(self._features)]
            return self._samples.layers(name, _in_one(others))

        set_random_state(self._states[number])
        with loss.target_reader.reading(layers_of) as layers:
            yield watched
        loss.compare(watched, (self._samples, layers), self._guide, log=log, scale=len(self.batches))

    @torch.no_grad()
    def _run_guide(self) -> tuple[Samples, Groups]:
        """Run the guide on each micro-batch, and make its layers of the whole."""
        guides = [guide_batch(batch, self.loss.target, self.loss.guide) for batch in self.batches]
        samples = self.loss.samples_of(joined(guides), like=self._samples)
        return samples, _layers([self.loss.running.read(batch, _kept) for batch in guides], samples)

    def _run_ahead(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """Run the target on each micro-batch; keep its features and the random state of each run, and restore its
        buffers.
        """
        target, found = self.loss.target, []
        buffers = [(buffer, buffer.clone()) for buffer in target.buffers()]
        for batch in batches:
            self._states.append(random_state())
            inputs = without_guide(batch, self.loss.config.sample_id_column)
            inputs = {name: value for name, value in inputs.items() if name not in self._leave_out}
            with self.loss.autocast(), self.loss.target_reader.reading(_kept) as read:
                target(**inputs)
            found.append(read)
        for buffer, before in buffers:
            buffer.copy_(before)
        return found


def joined(batches: Sequence[Batch]) -> dict[str, Any]:
    """Join the tensors of micro-batches into one batch, with rows padded to the longest.

    Raises:
        ValueError: If the columns differ, or if the lengths differ and there is no mask.
    """
    first = batches[0]
    if any(batch.keys() != first.keys() for batch in batches):
        raise ValueError(f"the micro-batches have different columns: {[sorted(batch) for batch in batches]}.")
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
            f"the micro-batches differ in the length of {sorted(unknown)} and have no attention_mask, so padding is "
            "unknown. Add a mask, or pad to a fixed length. Rows of packed documents need similarity_batch='local'."
        )
    return {name: _in_one(parts, NO_LABEL * (name == "labels")) for name, parts in tensors.items()}


def _in_one(parts: Sequence[Tensor], fill: float = 0) -> Tensor:
    """Concatenate along the first axis; pad the second to the longest."""
    length = max((part.shape[1] for part in parts if part.ndim > 1), default=0)
    return torch.cat([_padded(part, length, fill) for part in parts])


def _padded(part: Tensor, length: int, fill: float) -> Tensor:
    if part.ndim < 2 or part.shape[1] == length:
        return part
    rest = part.new_full((part.shape[0], length - part.shape[1], *part.shape[2:]), fill)
    return torch.cat([part, rest], 1)


def _kept(name: str, features: Tensor) -> Tensor:
    """Copy features that the network may overwrite."""
    return features.detach() if HIDDEN.fullmatch(name) else features.detach().clone()


def _layers(read: Sequence[Mapping[str, Tensor]], samples: Samples) -> dict[str, tuple[Layer, ...]]:
    return {name: samples.layers(name, _in_one([features[name] for features in read])) for name in read[0]}


def check_accumulates(args: TrainingArguments, sharded: bool) -> None:
    """Raise ValueError if `similarity_batch="accumulated"` cannot work with these settings."""
    if sharded:
        raise ValueError(
            "similarity_batch='accumulated' also runs the target outside the training step, which FSDP and DeepSpeed "
            "do not allow. Use similarity_batch='global' over more processes, or DDP."
        )
    if args.torch_compile:
        raise ValueError(
            "similarity_batch='accumulated' needs the same dropout in two forwards, and torch_compile draws its own. "
            "Leave one of the two out."
        )
    if args.gradient_accumulation_steps < 2:
        raise ValueError(
            "similarity_batch='accumulated' compares over the micro-batches of a step, but gradient_accumulation_steps "
            f"is {args.gradient_accumulation_steps}. Set it to 2 or more, or use 'local', which is the same for one."
        )
