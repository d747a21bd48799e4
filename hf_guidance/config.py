"""`GuidanceConfig`: every knob of guidance, described once and checked when it is made."""

from __future__ import annotations

import inspect
import json
import math
import os
import sys
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Optional, TypeAlias, TypeVar

from hf_guidance.mapping import check_mapping, parse_pair
from hf_guidance.schedule import check_schedule
from hf_guidance.similarity.measures import MEASURES, get_measure

Config = TypeVar("Config")
Json: TypeAlias = "Mapping[str, Json] | Sequence[Json] | str | int | float | bool | None"

CONFIG_NAME = "guidance_config.json"
HIDDEN_STATES = "hidden_states"

CHOICES = {
    "guidance_reduction": ("sum", "mean"),
    "sample_axis": ("sequence", "token"),
    "similarity_batch": ("local", "global", "accumulated"),
    "guide_input": ("batch", "noise", "prealign_noise", "shuffled"),
    "guide_batch_norm": ("eval", "batch", "calibrated"),
    "on_non_finite": ("stop", "skip"),
}


def _describe_fields(config: type[Config]) -> type[Config]:
    """Add the help text of every field to a dataclass's docstring."""
    texts = "".join(_entry(f"{f.name}: {f.metadata['help']}") for f in fields(config))  # type: ignore[arg-type]
    config.__doc__ = f"{inspect.cleandoc(config.__doc__ or '')}\n\nFields:{texts}\n"
    return config


def _entry(text: str) -> str:
    return "\n" + textwrap.fill(text, 116, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)


def _knob(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@_describe_fields
@dataclass
class GuidanceConfig:
    """What is compared, how much it weighs and when. Stands beside `TrainingArguments`; both parse as flags.

    Raises:
        ValueError: at construction, for any value that is not possible, naming what is.
    """

    # Optional[...] and not `... | None`: HfArgumentParser on Python 3.10 reads only the former.
    measure: str = _knob("linear_cka", f"Similarity to raise: {', '.join(MEASURES)}.")
    guidance_weight: float = _knob(1.0, "Weight of the guidance loss; 0 trains as plain Trainer does.")
    guidance_reduction: str = _knob("sum", "Over the layer pairs: sum (the paper's) or mean.")
    guidance_schedule: str = _knob("constant", "Weight over time: constant, linear or cosine decay.")
    guidance_stop_step: Optional[int] = _knob(
        None, "No guidance from this optimizer step on (guidance as initialisation); a decay ends here."
    )
    guidance_every: int = _knob(1, "Guide at each so-manieth optimizer step only; the guide rests at the others.")
    prealign_steps: int = _knob(0, "Optimizer steps at the start that train on guidance alone.")
    target_layers: list[str] = _knob(
        [HIDDEN_STATES],
        "The target's layers: hidden_states (those of output_hidden_states but the embeddings), hidden_states.<i>, "
        "or modules by name, glob (h.*.mlp) or type (Conv2d).",
    )
    guide_layers: list[str] = _knob([HIDDEN_STATES], "The guide's layers, named in the same way.")
    layer_mapping: str = _knob("even", "Which layers pair up: even, reversed (a control) or last_<k>.")
    layer_pairs: Optional[list[str]] = _knob(
        None, "Explicit pairs '<target layer>~<guide layer>' instead of a mapping."
    )
    sample_axis: str = _knob(
        "sequence", "What one sample is: sequence (a batch row, positions flattened) or token (a valid position)."
    )
    max_tokens: int = _knob(1024, "With sample_axis=token: at most so many positions, chosen by a hash, per batch.")
    similarity_batch: str = _knob(
        "local",
        "The batch a similarity is taken over: local (each process its own), global (all processes' as one) or "
        "accumulated (each process its own of a whole optimizer step, the target running twice).",
    )
    sketch: Optional[int] = _knob(
        None, "Keep so many numbers a sample of wider layers, by a random linear sketch; none compares exactly."
    )
    cache_guide: Optional[str] = _knob(
        None,
        "Folder for the guide's sketched features of every sample: the guide sees each once, and its input must be the "
        "same in every epoch.",
    )
    sample_id_column: Optional[str] = _knob(
        None, "With cache_guide: the column that numbers the samples, from 0 to one less than there are."
    )
    guide_input: str = _knob(
        "batch",
        "What the guide sees: batch; noise; prealign_noise (both networks see the same noise while pre-aligning, the "
        "batch after); shuffled (another row's input, a control).",
    )
    guide_batch_norm: str = _knob(
        "eval",
        "The guide's batch norm: eval (its running statistics), batch (the batch's) or calibrated (running statistics "
        "estimated on the training data before the first step).",
    )
    calibration_batches: int = _knob(10, "Batches that guide_batch_norm=calibrated is estimated from.")
    guide_shares_tokenizer: bool = _knob(
        False, "The two vocabularies differ in size only, as when one embedding is padded: feed the same ids to both."
    )
    log_measures: list[str] = _knob(["debiased_cka"], "Measures that are logged beside the one trained on.")
    on_non_finite: str = _knob(
        "stop", "An optimizer step whose loss, similarity or gradient is not finite: stop, naming it, or skip the step."
    )
    shard_guide: bool = _knob(
        False, "Keep a share of the guide's weights on each process, for a guide too large to be whole on all of them."
    )
    save_guide: bool = _knob(False, "Save the guide's weights beside the run, in <output_dir>/guide.")

    def __post_init__(self) -> None:
        _check_types(self)
        for name, possible in CHOICES.items():
            if getattr(self, name) not in possible:
                raise ValueError(f"{name} is {getattr(self, name)!r}; possible are {', '.join(possible)}.")
        for name in [self.measure, *self.log_measures]:
            get_measure(name)
        check_schedule(self.guidance_schedule)
        check_mapping(self.layer_mapping)
        self._check_numbers()
        self._check_layers()
        self._check_cache()

    def _check_numbers(self) -> None:
        if not (math.isfinite(self.guidance_weight) and self.guidance_weight >= 0):
            raise ValueError(f"guidance_weight is {self.guidance_weight}; it must be a finite number ≥ 0.")
        least = {"prealign_steps": 0, "calibration_batches": 1, "max_tokens": get_measure(self.measure).min_samples}
        least |= {"guidance_every": 1, "sketch": 1}
        for name, minimum in least.items():
            if getattr(self, name) is not None and getattr(self, name) < minimum:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {minimum}.")
        if self.guidance_stop_step is not None and self.guidance_stop_step < max(1, self.prealign_steps):
            raise ValueError(
                f"guidance_stop_step is {self.guidance_stop_step}; it must be at least 1 and not before the end of "
                f"pre-alignment (prealign_steps={self.prealign_steps}). For no guidance set guidance_weight=0."
            )
        if self.prealign_steps and not self.guidance_weight:
            raise ValueError("prealign_steps trains on guidance alone, and guidance_weight is 0: give it a weight.")
        if self.guide_input == "prealign_noise" and not self.prealign_steps:
            raise ValueError("guide_input='prealign_noise' is for pre-alignment: set prealign_steps to 1 or more.")

        if self.similarity_batch == "accumulated" and self.guide_input != "batch":
            raise ValueError(
                f"similarity_batch='accumulated' needs guide_input='batch', got {self.guide_input!r}: set it, or "
                "similarity_batch='local'."
            )

    def _check_layers(self) -> None:
        for name in ("target_layers", "guide_layers"):
            if not getattr(self, name) or not all(entry.strip() for entry in getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}; name at least one layer, or '{HIDDEN_STATES}'.")
        if self.layer_pairs is None:
            return
        if not self.layer_pairs:
            raise ValueError("layer_pairs is empty; name at least one pair, or leave it out for a mapping.")
        if self.target_layers != [HIDDEN_STATES] or self.guide_layers != [HIDDEN_STATES]:
            raise ValueError("layer_pairs already names the layers: leave target_layers and guide_layers out.")
        pairs = [parse_pair(text) for text in self.layer_pairs]
        if len(set(pairs)) < len(pairs):
            raise ValueError(f"layer_pairs names a pair twice: {self.layer_pairs}.")

    def _check_cache(self) -> None:
        if self.cache_guide is None:
            if self.sample_id_column is not None:
                raise ValueError("sample_id_column is for cache_guide: name a folder, or leave both out.")
            return
        if self.sketch is None or self.sample_id_column is None:
            raise ValueError(
                "cache_guide keeps a sketch of each sample's features under its id: set sketch (1024, say) and "
                "sample_id_column (dataset.add_column('id', range(len(dataset))) makes one)."
            )
        if self.similarity_batch == "accumulated":
            raise ValueError("cache_guide cannot be had with similarity_batch='accumulated': leave one of the two out.")
        for name, possible in (("sample_axis", "sequence"), ("guide_input", "batch")):
            if getattr(self, name) != possible:
                raise ValueError(
                    f"cache_guide needs guide features that depend on the sample alone, and {name} is "
                    f"{getattr(self, name)!r}: set {possible!r}, or leave cache_guide out."
                )
        if self.shard_guide:
            raise ValueError(
                "cache_guide runs the guide where a process meets new samples, and with shard_guide all must run it "
                "together: leave one of the two out."
            )
        if self.guide_batch_norm == "batch":
            raise ValueError(
                "cache_guide needs guide features that depend on the sample alone, and with guide_batch_norm='batch' "
                "they depend on the whole batch: set 'eval' or 'calibrated', or leave cache_guide out."
            )

    # ------------------------------------------------------------------------------------------------------- JSON

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def alone(self) -> GuidanceConfig:
        """The same comparison for one process and one batch outside of training: no other ranks, no cache, any step."""
        local: dict[str, Any] = {"similarity_batch": "local", "cache_guide": None, "sample_id_column": None}
        return replace(self, **local, guidance_every=1, shard_guide=False)

    def without_paths(self) -> dict[str, Any]:
        """As `to_dict`, for others to see: no folder of this machine."""
        cache = None if self.cache_guide is None else os.path.basename(os.path.normpath(self.cache_guide))
        return self.to_dict() | {"cache_guide": cache}

    @classmethod
    def from_dict(cls, values: Mapping[str, Json]) -> GuidanceConfig:
        """Build from plain values. Raises ValueError for an unknown field or a value of the wrong type."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"Unknown guidance fields {unknown}; this version knows {known}.")
        given: dict[str, Any] = dict(values)
        return cls(**given)  # which checks their types

    def save(self, directory: str | os.PathLike[str], guide: Mapping[str, Json] | None = None) -> Path:
        """Write `guidance_config.json`, the guide's identity in a section of its own; return its path."""
        path = Path(directory) / CONFIG_NAME
        content = {"guidance": self.without_paths(), "guide": guide or {}}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> tuple[GuidanceConfig, dict[str, Any]]:
        """Read what `save` wrote: the config and the guide's identity."""
        path = Path(directory) / CONFIG_NAME
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or set(content) != {"guidance", "guide"}:
            raise ValueError(f"{path} is not a guidance config: expected the sections 'guidance' and 'guide'.")
        return cls.from_dict(content["guidance"]), content["guide"]


def _check_types(config: GuidanceConfig) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _fits(value, hint):
            wanted = getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
            raise ValueError(f"{name} is {repr(value)[:80]} ({type(value).__name__}); expected {wanted}.")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(entry, arguments[0]) for entry in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float and isinstance(value, int):
        return abs(value) <= sys.float_info.max  # a larger one is no float
    return isinstance(value, hint)
