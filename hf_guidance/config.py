"""`GuidanceConfig`: all settings of guidance, described once and checked at construction."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import math
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Optional, TypeAlias, TypeVar

from hf_guidance.mapping import check_mapping, pair_weight, parse_pair
from hf_guidance.schedule import check_schedule, check_warmup
from hf_guidance.similarity.registry import MEASURES, check_measure, min_samples

Config = TypeVar("Config")
Json: TypeAlias = "Mapping[str, Json] | Sequence[Json] | str | int | float | bool | None"

CONFIG_NAME = "guidance_config.json"
HIDDEN_STATES = "hidden_states"
AUTO = "auto"

CHOICES = {
    "guidance_reduction": ("sum", "mean"),
    "sample_axis": ("sequence", "token", "within"),
    "feature_layout": (AUTO, "channels_first", "channels_last"),
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


def _name_unknown_fields(config: type[Config]) -> type[Config]:
    """Let a dataclass say which field was meant by an unknown one."""
    make = config.__init__

    @functools.wraps(make)
    def init(self: Config, *args: Any, **values: Any) -> None:
        if why := _why_unknown(values, [f.name for f in fields(config)]):  # type: ignore[arg-type]
            raise TypeError(why)
        make(self, *args, **values)

    config.__init__ = init  # type: ignore[method-assign, assignment]
    return config


def _why_unknown(names: Iterable[str], known: list[str]) -> str | None:
    """Name the unknown fields, and the known one that is nearest to the first; None if all are known."""
    unknown = sorted(set(names) - set(known))
    if not unknown:
        return None
    close = [
        *difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.8),
        *(name for name in known if unknown[0] in name),
        *difflib.get_close_matches(unknown[0], known, n=1),
    ]
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown guidance fields {unknown}.{hint} This version knows {', '.join(known)}."


def _entry(text: str) -> str:
    return "\n" + textwrap.fill(text, 116, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)


def _knob(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@_describe_fields
@_name_unknown_fields
@dataclass
class GuidanceConfig:
    """Settings of guidance: which layers are compared, how, with which weight and when.

    Use it beside `TrainingArguments`. `HfArgumentParser((TrainingArguments, GuidanceConfig))` parses both.

    Raises:
        ValueError: If a field has an impossible value or type, or two fields contradict each other. The message names
            the possible values.
        TypeError: If there is no field of a name. The message names the nearest one.
    """

    # Optional[...] rather than `... | None`: on Python 3.10 HfArgumentParser reads only the former.
    measure: str = _knob(
        AUTO,
        f"Similarity measure to maximise: {AUTO}, {', '.join(MEASURES)}, a registered one, or module:function for your "
        f"own. {AUTO} takes ridge_loo, or debiased_cka with a sketch, and is saved as what it took. "
        "linear_cka and ridge are near 1 from the start where features outnumber samples.",
    )
    ridge_penalty: Optional[float] = _knob(
        None,
        "Penalty of ridge and ridge_loo, over the mean squared norm of the target's samples. Unset takes 0.1 for ridge "
        f"and 1 for ridge_loo; with measure={AUTO} 0.1 for tokens, too.",
    )
    guidance_weight: float = _knob(1.0, "Weight of the guidance loss. 0 turns guidance off.")
    guidance_reduction: str = _knob(
        "sum", "How to combine the losses of the layer pairs: sum (as in the paper) or mean, both weighted."
    )
    guidance_schedule: str = _knob(
        "constant", "Guidance weight over the run: constant, or linear or cosine decay to 0."
    )
    guidance_stop_step: Optional[int] = _knob(
        None,
        "Optimizer step at which guidance stops (guidance as initialisation). A decay ends here. Unset guides to the "
        "end of the run.",
    )
    guidance_stop_similarity: Optional[float] = _knob(
        None,
        "Mean similarity over all pairs, in (0, 1], at which guidance stops for good. It is decided every 20 optimizer "
        "steps, from the guided steps since the last decision. Unset never stops for it.",
    )
    guidance_warmup_steps: int = _knob(
        0,
        "Number of optimizer steps, after prealign_steps, over which the guidance weight rises linearly to its full "
        "value.",
    )
    guidance_every: int = _knob(1, "Guide only every N optimizer steps; skip the guide's forward otherwise.")
    prealign_steps: int = _knob(0, "Number of first optimizer steps that train on guidance alone.")
    target_layers: list[str] = _knob(
        [HIDDEN_STATES],
        "Layers of the target to compare: hidden_states (all that output_hidden_states returns, except the "
        "embeddings), hidden_states.<i>, or modules by name, glob (h.*.mlp) or type (Conv2d). A module must keep the "
        "order of the batch's rows.",
    )
    guide_layers: list[str] = _knob([HIDDEN_STATES], "Layers of the guide to compare, named like target_layers.")
    layer_mapping: str = _knob(
        "even", "How to pair the layers: even, reversed (a negative control) or last_<k> (the last k of both)."
    )
    layer_pairs: Optional[list[str]] = _knob(
        None,
        "Explicit pairs '<target layer>~<guide layer>'. They replace layer_mapping, target_layers and guide_layers. "
        "'@' gives a pair a weight other than 1: 'h.3~h.1@0.5'.",
    )
    sample_axis: str = _knob(
        "sequence",
        "Meaning of one sample: sequence (a batch row, positions flattened), token (a valid position of any row) or "
        "within (a valid position among those of its row; the similarity is the mean over the rows).",
    )
    feature_layout: str = _knob(
        AUTO,
        "With sample_axis=token or within: which axis of an image's feature map (batch, …, …, …) holds the channels, "
        "where weights and shape leave it open: channels_first or channels_last. auto raises an error there.",
    )
    max_tokens: int = _knob(
        1024, "With sample_axis=token or within: largest number of positions per batch, or per row, chosen by a hash."
    )
    skip_first_positions: int = _knob(
        0,
        "Number of first positions of each row to leave out, in layers (batch, length, d). The first tokens of "
        "pretrained networks can carry most of the energy of a layer.",
    )
    guide_rows: Optional[int] = _knob(
        None,
        "Run the guide on this many rows of the batch, chosen by a hash in each step, and compare only these. Unset "
        "takes all rows.",
    )
    similarity_batch: str = _knob(
        "local",
        "Batch to compute a similarity over: local (each process its own batch), global (the batches of all processes; "
        "of one process its own) or accumulated (each process all its micro-batches of an optimizer step; the target "
        "runs twice).",
    )
    sketch: Optional[int] = _knob(
        None, "Project wide layers to this many random dimensions. Unset compares the layers exactly."
    )
    cache_guide: Optional[str] = _knob(
        None,
        "Folder to cache the guide's sketched features in, so that the guide runs once per sample. The guide's input "
        "must be the same in every epoch. Needs sketch and sample_id_column.",
    )
    sample_id_column: Optional[str] = _knob(
        None, "With cache_guide: dataset column with the sample ids, from 0 to the number of samples − 1."
    )
    guide_input: str = _knob(
        "batch",
        "Input of the guide: batch, noise, prealign_noise (the same noise for both networks during pre-alignment, "
        "then the batch) or shuffled (the input of another row, a negative control; if positions are compared, of "
        "a row of equal length, and a row without one, of which a tenth may be, keeps its own).",
    )
    guide_batch_norm: str = _knob(
        "eval",
        "Statistics of the guide's batch norm: eval (its running statistics), batch (those of the current batch) or "
        "calibrated (running statistics re-estimated on the training data before the first step).",
    )
    calibration_batches: int = _knob(10, "With guide_batch_norm=calibrated: number of batches to estimate it from.")
    guide_shares_tokenizer: bool = _knob(
        False,
        "Feed the same token ids to both networks although their vocabularies differ in size. Set it only if one "
        "tokenizer serves both, as when one embedding is padded.",
    )
    log_measures: list[str] = _knob(["debiased_cka"], "Further similarity measures to log, without training on them.")
    log_gradients: bool = _knob(
        False,
        "Log the cosine of the angle between the gradients of guidance and task, and the ratio of their norms, in the "
        "weights that guidance reaches. Each logged step takes two more backward passes.",
    )
    eval_similarity: bool = _knob(
        False,
        "Measure the similarities at each evaluation too, on its data. Each batch takes one more forward of both "
        "networks.",
    )
    on_non_finite: str = _knob(
        "stop",
        "What to do if a loss, similarity or gradient is not finite: stop (with an error that names it) or skip "
        "(leave out that optimizer step).",
    )
    shard_guide: bool = _knob(
        False, "Shard the guide's weights over the processes, for a guide that is too large for one device."
    )
    save_guide: bool = _knob(False, "Save the guide's weights in <output_dir>/guide.")

    def __post_init__(self) -> None:
        _check_types(self)
        for name, possible in CHOICES.items():
            if getattr(self, name) not in possible:
                raise ValueError(f"{name} is {getattr(self, name)!r}; possible are {', '.join(possible)}.")
        for name in [self.resolved_measure(), *self.log_measures]:
            check_measure(name)
        check_schedule(self.guidance_schedule)
        check_mapping(self.layer_mapping)
        self._check_numbers()
        self._check_layers()
        self._check_cache()

    def _check_numbers(self) -> None:
        if not (math.isfinite(self.guidance_weight) and self.guidance_weight >= 0):
            raise ValueError(f"guidance_weight is {self.guidance_weight}; it must be a finite number ≥ 0.")
        needed = min_samples(self.resolved_measure())
        least = {
            "prealign_steps": 0,
            "calibration_batches": 1,
            "guidance_every": 1,
            "max_tokens": needed,
            "sketch": 2,
            "skip_first_positions": 0,
            "guide_rows": needed if self.sample_axis == "sequence" else 1,
        }
        for name, minimum in least.items():
            if getattr(self, name) is not None and getattr(self, name) < minimum:
                by = f", as {self.resolved_measure()} compares so many samples" if minimum == needed else ""
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {minimum}{by}.")
        if self.ridge_penalty is not None and not (math.isfinite(self.ridge_penalty) and self.ridge_penalty > 0):
            raise ValueError(f"ridge_penalty is {self.ridge_penalty}; it must be a finite number above 0.")
        if self.guidance_stop_step is not None and self.guidance_stop_step < max(1, self.prealign_steps):
            raise ValueError(
                f"guidance_stop_step is {self.guidance_stop_step}; it must be at least 1 and not before the end of "
                f"pre-alignment (prealign_steps={self.prealign_steps}). For no guidance set guidance_weight=0."
            )
        if self.sample_axis == "within" and (self.similarity_batch != "local" or self.sketch is not None):
            name, value = (
                ("sketch", self.sketch) if self.sketch is not None else ("similarity_batch", self.similarity_batch)
            )
            raise ValueError(
                "sample_axis='within' compares each row by itself, and weighs all rows of all processes and "
                f"micro-batches alike; it takes no {name}={value!r}: leave {name} out."
            )
        check_warmup(self.guidance_warmup_steps, self.prealign_steps, self.guidance_stop_step)
        if self.guidance_stop_similarity is not None and not 0 < self.guidance_stop_similarity <= 1:
            raise ValueError(
                f"guidance_stop_similarity is {self.guidance_stop_similarity}; it must be above 0 and at most 1, which "
                "is the same geometry. Leave it out to guide whatever the similarity."
            )
        if self.eval_similarity and not self.guidance_weight:
            raise ValueError(
                "eval_similarity measures guidance on validation data, but guidance_weight is 0: there is nothing to "
                "measure. Set guidance_weight above 0, or leave eval_similarity out."
            )
        if self.prealign_steps and not self.guidance_weight:
            raise ValueError(
                "prealign_steps trains on guidance alone, but guidance_weight is 0: set guidance_weight above 0."
            )
        if self.guide_input == "prealign_noise" and not self.prealign_steps:
            raise ValueError("guide_input='prealign_noise' is for pre-alignment: set prealign_steps to 1 or more.")
        if self.guide_rows is not None and self.similarity_batch == "accumulated":
            raise ValueError(
                "similarity_batch='accumulated' compares all rows of all micro-batches: leave guide_rows out, or set "
                "similarity_batch='local'."
            )
        if self.guide_rows == 1 and self.guide_input == "shuffled":
            raise ValueError("guide_input='shuffled' exchanges rows, but guide_rows is 1; it must be at least 2.")
        if self.guide_rows is not None and (self.guide_input, self.similarity_batch) == ("shuffled", "global"):
            raise ValueError(
                "guide_input='shuffled' exchanges rows of one process, and with similarity_batch='global' a process "
                "may have a single one of the guide_rows: leave guide_rows out, or set similarity_batch='local'."
            )
        if self.similarity_batch == "accumulated" and self.guide_input != "batch":
            raise ValueError(
                f"similarity_batch='accumulated' needs guide_input='batch', got {self.guide_input!r}: set "
                "guide_input='batch' or similarity_batch='local'."
            )

    def _check_layers(self) -> None:
        for name in ("target_layers", "guide_layers"):
            if not getattr(self, name) or not all(entry.strip() for entry in getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}; name at least one layer, or '{HIDDEN_STATES}'.")
            self._check_layers_once(name)
        if self.layer_pairs is None:
            return
        if not self.layer_pairs:
            raise ValueError("layer_pairs is empty; name at least one pair, or leave it out to use layer_mapping.")
        if self.target_layers != [HIDDEN_STATES] or self.guide_layers != [HIDDEN_STATES]:
            raise ValueError("layer_pairs already names the layers: leave target_layers and guide_layers out.")
        pairs = [parse_pair(text) for text in self.layer_pairs]
        for name in (name for pair in pairs for name in pair):
            if "*" in name or name in (HIDDEN_STATES, f"encoder_{HIDDEN_STATES}", f"decoder_{HIDDEN_STATES}"):
                raise ValueError(
                    f"layer_pairs names {name!r}, which may be several layers; a pair has one layer of each network, "
                    f"as 'h.3' or '{HIDDEN_STATES}.2'. To pair many, use target_layers, guide_layers and layer_mapping."
                )
        if len(set(pairs)) < len(pairs):
            raise ValueError(f"layer_pairs names a pair twice: {self.layer_pairs}.")
        if not any(pair_weight(text) for text in self.layer_pairs):
            raise ValueError(
                f"layer_pairs gives every pair the weight 0: {self.layer_pairs}. Give one a weight above 0; for no "
                "guidance set guidance_weight=0."
            )

    def _check_layers_once(self, field: str) -> None:
        names = getattr(self, field)
        for name in names:
            of_all = re.sub(rf"({HIDDEN_STATES})\.[1-9]\d*", r"\1", name)  # the first, of embeddings, is not among them
            if names.count(name) > 1 or (of_all != name and of_all in names):
                other = f"{of_all!r} has it, too" if of_all != name and of_all in names else "each layer counts once"
                raise ValueError(f"{field} names {name!r} twice ({other}): leave one out.")

    def _check_cache(self) -> None:
        for name, what in (("cache_guide", "folder"), ("sample_id_column", "column")):
            if (value := getattr(self, name)) is not None and not value.strip():
                raise ValueError(f"{name} is {value!r}; name a {what}, or leave it out.")
        if self.cache_guide is None:
            if self.sample_id_column is not None:
                raise ValueError(
                    "sample_id_column is only for cache_guide: set cache_guide to a folder, or leave both out."
                )
            return
        for name, possible in (("sample_axis", "sequence"), ("guide_input", "batch")):
            if getattr(self, name) != possible:
                raise ValueError(
                    f"cache_guide needs guide features that depend on the sample alone, but {name} is "
                    f"{getattr(self, name)!r}: set {name}={possible!r}, or leave cache_guide out."
                )
        if self.sketch is None or self.sample_id_column is None:
            raise ValueError(
                "cache_guide stores a sketch of each sample's features under the sample's id: set sketch (such as "
                "1024) and sample_id_column (dataset.add_column('id', range(len(dataset))) makes one)."
            )
        if self.eval_similarity:
            raise ValueError(
                "cache_guide stores the guide's features of training rows under their ids, and validation rows have no "
                "ids: leave out eval_similarity or cache_guide."
            )
        if self.similarity_batch == "accumulated":
            raise ValueError("cache_guide does not work with similarity_batch='accumulated': leave one of the two out.")
        if self.shard_guide:
            raise ValueError(
                "cache_guide runs the guide only on a process that has new samples, but with shard_guide all processes "
                "must run it together: leave one of the two out."
            )
        if self.guide_batch_norm == "batch":
            raise ValueError(
                "cache_guide needs guide features that depend on the sample alone, but with guide_batch_norm='batch' "
                "they depend on the whole batch: set 'eval' or 'calibrated', or leave cache_guide out."
            )

    # ---------------------------------------------------------------------------------------------------- measure

    def resolved_measure(self) -> str:
        """Return the measure. `auto` is ridge_loo, or debiased_cka for a sketch, which ridge_loo does not take.

        Neither is near 1 for unrelated features, whatever their number. recipes/LOG.md has the evidence.
        """
        if self.measure != AUTO:
            return self.measure
        return "ridge_loo" if self.sketch is None else "debiased_cka"

    def resolved(self) -> GuidanceConfig:
        """Return a copy that names what `auto` stands for. Many tokens need a smaller penalty than few rows."""
        measure, penalty = self.resolved_measure(), self.ridge_penalty
        if self.measure == AUTO and measure == "ridge_loo" and self.sample_axis == "token":
            penalty = 0.1 if penalty is None else penalty
        return replace(self, measure=measure, ridge_penalty=penalty)

    # ------------------------------------------------------------------------------------------------------- JSON

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def alone(self) -> GuidanceConfig:
        """Return a copy for one process and one batch outside training: no ranks, no cache, each step guided fully."""
        local: dict[str, Any] = {"similarity_batch": "local", "cache_guide": None, "sample_id_column": None}
        return replace(self, **local, guidance_every=1, guidance_warmup_steps=0, shard_guide=False)

    def without_paths(self) -> dict[str, Any]:
        """Return the fields as `to_dict` does, but with only the last part of the path in `cache_guide`."""
        cache = None if self.cache_guide is None else os.path.basename(os.path.normpath(self.cache_guide))
        return self.to_dict() | {"cache_guide": cache}

    @classmethod
    def from_dict(cls, values: Mapping[str, Json]) -> GuidanceConfig:
        """Build a config from JSON values.

        Raises:
            ValueError: If a field is unknown, or a value has the wrong type or is not possible.
        """
        if why := _why_unknown(values, [f.name for f in fields(cls)]):
            raise ValueError(why)
        given: dict[str, Any] = dict(values)
        return cls(**given)  # which checks their types

    def save(self, directory: str | os.PathLike[str], guide: Mapping[str, Json] | None = None) -> Path:
        """Write `guidance_config.json`.

        Args:
            directory: Folder to write to.
            guide: The guide's identity, written to a section of its own.

        Returns:
            Path of the file.
        """
        path = Path(directory) / CONFIG_NAME
        content = {"guidance": self.without_paths(), "guide": guide or {}}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> tuple[GuidanceConfig, dict[str, Any]]:
        """Read what `save` wrote.

        Returns:
            The config, and the guide's identity.

        Raises:
            ValueError: If the file is not a guidance config, or has an unknown field or an impossible value.
        """
        path = Path(directory) / CONFIG_NAME
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or set(content) != {"guidance", "guide"}:
            raise ValueError(f"{path} is not a guidance config: expected the sections 'guidance' and 'guide'.")
        return cls.from_dict(content["guidance"]), content["guide"]


def _check_types(config: GuidanceConfig) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _fits(value, hint):
            form = " Write each pair as one text, such as ['h.1~h.3']." if name == "layer_pairs" else ""
            said = f"{name} is {repr(value)[:80]} ({type(value).__name__}); expected {_in_words(hint)}."
            raise ValueError(said + form)


def _in_words(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [_in_words(option) for option in typing.get_args(hint) if option is not type(None)]
        return " or ".join([*options, "None"])
    return str(hint) if typing.get_args(hint) else hint.__name__


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(entry, arguments[0]) for entry in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float and isinstance(value, int):
        return abs(value) <= sys.float_info.max  # a larger integer does not fit in a float
    return isinstance(value, hint)
