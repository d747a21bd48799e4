"""Warnings about the first guided batch: what is likely to spoil the run, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from hf_guidance.analysis.first_batch import DEBIASED, TOP, FirstLook, PairLook
from hf_guidance.config import GuidanceConfig

FULL, FAR = 0.9, 0.3  # a similarity above the first is full if debiased CKA is lower by the second
NEVER_FULL = {DEBIASED, "ridge_loo"}  # near 0 for unrelated features, whatever their number, if no sample has a copy
HIGH = 0.6  # a similarity by these that copies of samples explain, where there are many
LARGE_SHARE = 0.5  # share of a layer's energy above which few samples, or repeated ones, are said
LARGE, SMALL = 30.0, 0.01  # ratios of the gradients that are warned of
HELPED = (0.06, 11.0)  # ratios at which runs that guidance helps have started
MAX_NAMED = 5


def warnings_of(
    look: FirstLook, config: GuidanceConfig, *, has_batch_norm: bool = False, accumulation: int = 1
) -> list[str]:
    """Return the warnings about a look, each with a remedy.

    Args:
        look: The look.
        config: Settings of guidance.
        has_batch_norm: Whether the guide has batch norm.
        accumulation: Micro-batches in an optimizer step.
    """
    found = (
        _full(look, config),
        _dead(look, config, has_batch_norm),
        _massive(look, config),
        _gradients(look, config),
        _summed(look, accumulation),
    )
    return [words for words in found if words]


def _full(look: FirstLook, config: GuidanceConfig) -> str:
    """Warn of a measure that is full from the start in at least half of the pairs, because of copies or few samples."""
    pairs = [pair for pair in look.pairs if _is_full(pair, look.measure)]
    guides, targets = look.guides, look.targets
    copied = [pair for pair in pairs if guides[pair.guide].repeated > LARGE_SHARE and targets[pair.target].repeated]
    if copied and 2 * len(copied) >= len(look.pairs):
        return _copied(look, copied, config)
    if look.measure in NEVER_FULL or not pairs or 2 * len(pairs) < len(look.pairs):
        return ""
    more = {"token": "raise max_tokens", "within": "longer rows"}.get(look.sample_axis, "a larger batch")
    debiased = fmean(pair.debiased_cka or 0.0 for pair in pairs)
    return (
        f"{_starts(look, pairs)}, where {DEBIASED} is {debiased:.2f}: it is full because samples are few, and leaves "
        f"little to learn. Set measure='{DEBIASED}' or 'ridge_loo', or compare more samples ({more})."
    )


def _is_full(pair: PairLook, measure: str) -> bool:
    if measure in NEVER_FULL:
        return pair.similarity > HIGH
    return pair.debiased_cka is not None and pair.similarity > FULL and pair.similarity - pair.debiased_cka > FAR


def _copied(look: FirstLook, pairs: Sequence[PairLook], config: GuidanceConfig) -> str:
    """Warn of pairs whose similarity is that of copies, of which each tells the other."""
    share = fmean(look.guides[pair.guide].repeated for pair in pairs)
    advice = "Leave copies of rows out of the data."
    if look.sample_axis != "sequence":
        more = config.skip_first_positions + 1
        advice = (
            f"If all rows begin with the same tokens, leave these out with skip_first_positions={more} or more; if "
            "rows are copies, leave them out of the data."
        )
    return (
        f"{_starts(look, pairs)}, because samples that occur more than once hold {100 * share:.0f} % of the energy of "
        f"the guide's layers: copies are alike in any two networks, so that little is left to learn. {advice}"
    )


def _starts(look: FirstLook, pairs: Sequence[PairLook]) -> str:
    mean = fmean(pair.similarity for pair in pairs)
    return f"{look.measure} starts at {mean:.2f} in {_of(len(pairs), len(look.pairs), 'pair')}"


def _dead(look: FirstLook, config: GuidanceConfig, has_batch_norm: bool) -> str:
    dead = [name for name, layer in look.guides.items() if layer.is_dead]
    if not dead:
        return ""
    choice = "Choose other guide_layers."
    if has_batch_norm and config.guide_batch_norm == "eval":
        choice = "Set guide_batch_norm='calibrated' or 'batch', or choose other guide_layers."
    return (
        f"{_of(len(dead), len(look.guides), 'guide layer')} {'is' if len(dead) == 1 else 'are'} dead: "
        f"{named(dead)}. The samples are equal there up to rounding, so that the similarity stays 0. {choice}"
    )


def _massive(look: FirstLook, config: GuidanceConfig) -> str:
    sides = (("target", look.targets), ("guide", look.guides))
    layers = [(f"{side} {name}", layer.top_share) for side, layers in sides for name, layer in layers.items()]
    massive = [f"{name} ({100 * share:.0f} %)" for name, share in layers if share is not None and share > LARGE_SHARE]
    if not massive:
        return ""
    advice = "Choose other layers, or look for outliers among the rows."
    if look.sample_axis != "sequence":
        more = config.skip_first_positions + 1
        advice = f"If these are the first positions of each row, leave them out with skip_first_positions={more}."
    return (
        f"Massive activations: {100 * TOP:.0f} % of the samples hold more than half of the energy in "
        f"{_of(len(massive), len(layers), 'layer')}: {named(massive)}. Similarities are about these samples alone. "
        f"{advice}"
    )


def _gradients(look: FirstLook, config: GuidanceConfig) -> str:
    ratio = look.gradient_ratio
    if not ratio or SMALL <= ratio <= LARGE or (ratio < SMALL and _full(look, config)):  # a full measure has no slope
        return ""
    drowns, change = ("drowns the task", "Lower") if ratio > LARGE else ("has no effect beside the task", "Raise")
    equal, now = _digits(config.guidance_weight / ratio, 1), f"{config.guidance_weight:g}"
    return (
        f"The gradient of guidance is {_digits(ratio, 2)} times that of the task in the weights that it reaches: "
        f"guidance {drowns}. {change} guidance_weight, now {now}; at about {equal} both would be equal."
    )


def _summed(look: FirstLook, accumulation: int) -> str:
    if look.uses_item_count is not False or accumulation < 2:
        return ""
    return (
        f"The target accepts num_items_in_batch but its loss does not use it, so Trainer sums the task loss over the "
        f"{accumulation} micro-batches instead of averaging it: guidance weighs 1/{accumulation} as much as without "
        "accumulation. Set model.accepts_loss_kwargs = False before the trainer is made, pass compute_loss_func, or "
        f"multiply guidance_weight by {accumulation}."
    )


def _digits(value: float, count: int) -> str:
    return f"{float(f'{value:.{count}g}'):g}"  # 1200 rather than 1.2e+03


def _of(count: int, total: int, noun: str) -> str:
    return f"{count} of {total} {noun}{'' if total == 1 else 's'}"


def named(names: Sequence[str]) -> str:
    """Join names, the first few of many."""
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
