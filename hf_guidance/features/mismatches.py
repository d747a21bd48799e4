"""Explanations of what two networks' samples have wrong: too few, or others than the other network's."""

from __future__ import annotations

from hf_guidance.features.rows import ComparedRows, side_of


def why_unlike(target: tuple[ComparedRows, str], guide: tuple[ComparedRows, str], missing: int) -> str:
    """Explain why two layers have other positions, as far as that is known, and what to do about it.

    Args:
        target: The target's rows, and the name of its layer.
        guide: The guide's rows, and the name of its layer.
        missing: How many positions fewer the guide's layer has.
    """
    for (rows, name), (others, their_name), role in ((target, guide, "target"), (guide, target, "guide")):
        decodes = "decoder" in rows.masks and side_of(name) == "decoder"
        if decodes and not ("decoder" in others.masks and side_of(their_name) == "decoder"):
            return (
                f"Those of the {role} are its decoder's, and those of the other network its input's: name the "
                f"{role}'s encoder ({role}_layers=['encoder_hidden_states']), or use sample_axis='sequence'."
            )
    conventions = target[0].conventions
    if (virtual := conventions.virtual_tokens() if conventions else 0) and missing == virtual:
        return (
            f"The target's adapter puts {virtual} virtual tokens in front of each row, which the guide does not "
            "have: use sample_axis='sequence', or an adapter without virtual tokens, such as LoRA."
        )
    contents = [rows.content for rows, _ in (target, guide)]
    ids = [content.shape[1] for content in contents if content.ndim == 2 and not content.is_floating_point()]
    if len(set(ids)) > 1:
        return (
            f"The target gets rows of {ids[0]} token ids and the guide of {ids[1]}, as of two tokenizers: use "
            "sample_axis='sequence'."
        )
    return "Use sample_axis='sequence'" + (
        ", or skip_first_positions=1 if one of them has a class token." if abs(missing) == 1 else "."
    )


def why_too_few(axis: str, measure: str, needed: int, count: int, packed: bool = False) -> str:
    """Explain why a batch of too few samples is not guided, and what to do about it.

    Args:
        axis: As of `Samples`.
        measure: Name of the measure.
        needed: Fewest samples that it takes.
        count: Number of samples.
        packed: Whether the batch is one row of packed documents.
    """
    way_out = "set sample_axis='token'" if packed else "raise per_device_train_batch_size"
    if axis == "within":
        return (
            f"{measure} needs at least {needed} valid positions in a row, and no row of the batch has so many: set "
            "sample_axis='token'"
        )
    if axis == "token":
        kind = "valid tokens"
    else:
        kind = "row" if count == 1 else "rows"
        if packed:
            kind += ", into which documents are packed"
        else:
            way_out += ", or set dataloader_drop_last=True if it is an epoch's last batch"
    return f"{measure} needs at least {needed} samples, and the batch has {count} {kind}: {way_out}"
