"""Guidance of every forward of the target in one step, each on its own inputs, as sentence-transformers runs it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch

from hf_guidance.features.batch import Batch
from hf_guidance.features.inside import is_sentence_transformer, transformer_in
from hf_guidance.guide.forward import without_guide
from hf_guidance.guide.inputs import vocabulary_size
from hf_guidance.loss import GuidanceLoss, Watched
from hf_guidance.schedule import Weights

if TYPE_CHECKING:
    from hf_guidance.trainer.protocol import GuidedTrainer

FORWARDS = 2**16  # each forward of a micro-step draws its own randomness; no step has as many micro-steps


@contextmanager
def watch_each(
    loss: GuidanceLoss,
    batch: Batch,
    *,
    step: int = 0,
    micro_step: int = 0,
    rank: int = 0,
    log: bool = True,
    weights: Weights | None = None,
) -> Iterator[Watched]:
    """Watch every forward of the target inside the `with` block. The guide runs on the inputs of each.

    A trainer of sentence-transformers runs the target once for each column of texts, or for several columns that its
    loss joins. Losses and similarities are averaged over these forwards. Forwards without gradients, as of a reference,
    are left out if gradients are on.

    Args:
        loss: The guidance loss, which holds target, guide and settings.
        batch: Columns that the block gets in `inputs`.
        step, micro_step, rank, log, weights: As of `GuidanceLoss.watch`.

    Yields:
        The result, filled in when the block ends.

    Raises:
        ValueError: If the target did not run with gradients in the block. Also all that `GuidanceLoss.watch` raises.

    Example:
        >>> with watch_each(guidance, {}, step=step) as watched:  # doctest: +SKIP
        ...     task_loss = multiple_negatives(features, labels)  # doctest: +SKIP
        >>> watched.total(task_loss).backward()  # doctest: +SKIP
    """
    weights = weights or loss.weights(step)
    whole = Watched(without_guide(batch, loss.config.sample_id_column), weights)
    found: list[Watched] = []
    if not weights.guidance:
        yield whole
        return
    target: Any = loss.target
    plain, is_inside, with_gradients = target.forward, False, torch.is_grad_enabled()
    signature = inspect.signature(plain)

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        """Run the target through its hooks, which sentence-transformers passes by, and watch it."""
        nonlocal is_inside
        if is_inside or (with_gradients and not torch.is_grad_enabled()):
            return plain(*args, **kwargs)
        key = {"step": step, "micro_step": micro_step + FORWARDS * len(found), "rank": rank}
        is_inside = True
        try:
            with loss.watch(_named(signature, args, kwargs), **key, log=log, weights=weights) as watched:
                output = target(**watched.inputs)
        finally:
            is_inside = False
        found.append(watched)
        return output

    own = "forward" in vars(target)
    target.forward = forward
    try:
        yield whole
    finally:
        if own:
            target.forward = plain
        else:
            del target.forward
    if not found:
        raise ValueError(
            "the target did not run with gradients while the loss was computed: guidance cannot reach it. Losses that "
            "cache (Cached…Loss) run it in their backward pass: use the same loss without a cache."
        )
    _average(whole, found)


def _named(signature: inspect.Signature, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a forward by name."""
    named: dict[str, Any] = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


def _average(whole: Watched, found: Sequence[Watched]) -> None:
    """Fill in the mean over forwards. A pair that a forward skipped counts in the others alone."""
    whole.skipped_pairs = sum(watched.skipped_pairs for watched in found)
    guided = [watched for watched in found if watched.loss is not None]
    if not guided:
        whole.why_unguided = found[0].why_unguided
        return
    whole.loss = torch.stack([watched.loss for watched in guided if watched.loss is not None]).mean()
    for measure in guided[0].similarities:
        of_measure = [watched.similarities.get(measure, {}) for watched in guided]
        whole.similarities[measure] = {
            pair: torch.stack([similarities[pair] for similarities in of_measure if pair in similarities]).mean()
            for pair in dict.fromkeys(pair for similarities in of_measure for pair in similarities)
        }
    whole.layers = guided[0].layers  # for a look at the first batch


def watches_each(trainer: GuidedTrainer) -> bool:
    """Tell whether a trainer runs the target several times a step, on columns of its own naming."""
    return is_sentence_transformer(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False))


def check_watches_each(trainer: GuidedTrainer) -> None:
    """Raise ValueError for a setting that needs one forward of the target in each micro-step, or other token ids."""
    config = trainer.guidance
    settings = {
        "similarity_batch='accumulated'": config.similarity_batch == "accumulated",
        "sample_axis='within'": config.sample_axis == "within",
        "cache_guide": config.cache_guide is not None,
        "guide_batch_norm='calibrated'": config.guide_batch_norm == "calibrated",
    }
    for setting in (name for name, given in settings.items() if given):
        raise ValueError(
            f"{setting} needs a trainer that runs the target once in each micro-step, but sentence-transformers runs "
            "it for each column of texts: leave the setting out."
        )
    sizes = [vocabulary_size(network) for network in (transformer_in(trainer.model), trainer.guide)]
    if None not in sizes and sizes[0] != sizes[1] and not config.guide_shares_tokenizer:
        raise ValueError(
            f"the target's vocabulary has {sizes[0]} tokens and the guide's {sizes[1]}, but sentence-transformers "
            "tokenises for the target alone: choose a guide with the target's tokenizer. Or, if one tokenizer serves "
            "both and only the embedding is padded, set guide_shares_tokenizer=True."
        )
