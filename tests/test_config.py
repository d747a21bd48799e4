"""`GuidanceConfig`: its fields, its checks, its JSON and its flags."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import pickle
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import gpt2, llama
from transformers import HfArgumentParser, TrainingArguments

from hf_guidance import GuidanceConfig, GuidanceLoss
from hf_guidance.config import CHOICES
from hf_guidance.schedule import SCHEDULES
from hf_guidance.similarity.registry import MEASURES, get_measure

FIELDS = {field.name: field for field in dataclasses.fields(GuidanceConfig)}

CHANGED = {  # another value than the default for every field, all at once
    "measure": "debiased_cka",
    "guidance_weight": 0.5,
    "guidance_reduction": "mean",
    "guidance_schedule": "linear",
    "guidance_stop_step": 300,
    "guidance_stop_similarity": 0.75,
    "guidance_warmup_steps": 5,
    "prealign_steps": 20,
    "guidance_every": 4,
    "target_layers": ["h.*.mlp", "Linear"],
    "guide_layers": ["hidden_states.2"],
    "layer_mapping": "last_2",
    "sample_axis": "token",
    "max_tokens": 64,
    "skip_first_positions": 1,
    "guide_rows": 8,
    "feature_layout": "channels_last",
    "similarity_batch": "global",
    "sketch": 512,
    "ridge_penalty": 0.5,
    "guide_input": "prealign_noise",
    "guide_batch_norm": "batch",
    "calibration_batches": 3,
    "guide_shares_tokenizer": True,
    "log_measures": ["rsa", "ridge"],
    "eval_similarity": True,
    "log_gradients": True,
    "on_non_finite": "skip",
    "shard_guide": True,
    "save_guide": True,
}
PAIRS = {"layer_pairs": ["hidden_states.1~layer1@0.5", "hidden_states.2~layer1"]}
CACHED = {"cache_guide": "features", "sample_id_column": "id", "sketch": 64}


def parse(*flags: str) -> tuple[TrainingArguments, GuidanceConfig]:
    parser = HfArgumentParser((TrainingArguments, GuidanceConfig))
    return parser.parse_args_into_dataclasses([*flags, "--output_dir", "out"])


def as_flags(values: dict[str, Any]) -> list[str]:
    return [
        part
        for name, value in values.items()
        for part in [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    ]


# -------------------------------------------------------------------------------------------------------- the fields


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_described(name: str) -> None:
    text = FIELDS[name].metadata["help"]
    assert text[0].isupper()
    assert text.endswith(".")


def test_every_choice_is_named_where_it_is_described() -> None:
    choices = {**CHOICES, "measure": MEASURES, "guidance_schedule": SCHEDULES}
    missing = [
        (name, c) for name, possible in choices.items() for c in possible if c not in FIELDS[name].metadata["help"]
    ]
    assert not missing


@pytest.mark.parametrize("name", FIELDS)
def test_fields_are_scalars_optional_scalars_or_lists_of_strings(name: str) -> None:
    hint = typing.get_type_hints(GuidanceConfig)[name]
    options = set(typing.get_args(hint)) if typing.get_origin(hint) is typing.Union else {hint}
    (kind,) = options - {type(None)}
    assert kind in (str, int, float, bool, list[str])


def test_no_field_is_also_one_of_training_arguments() -> None:
    assert not set(FIELDS) & {field.name for field in dataclasses.fields(TrainingArguments)}


def test_the_defaults_are_the_papers_but_for_the_measure() -> None:
    config = GuidanceConfig()
    assert (config.measure, config.guidance_weight, config.guidance_reduction) == ("auto", 1.0, "sum")
    assert (config.layer_mapping, config.sample_axis, config.guide_input) == ("even", "sequence", "batch")


@pytest.mark.parametrize(
    ("settings", "became"),
    [
        ({}, {"measure": "ridge_loo"}),
        ({"sample_axis": "within"}, {"measure": "ridge_loo"}),
        ({"sample_axis": "token"}, {"measure": "ridge_loo", "ridge_penalty": 0.1}),
        ({"sample_axis": "token", "ridge_penalty": 2.0}, {"measure": "ridge_loo"}),
        ({"sample_axis": "token", "sketch": 64}, {"measure": "debiased_cka"}),
        ({"measure": "ridge", "sample_axis": "token"}, {}),
    ],
)
def test_an_automatic_measure_depends_on_the_samples_and_is_kept_as_what_it_became(
    tmp_path: Path, settings: dict[str, Any], became: dict[str, Any]
) -> None:
    config = GuidanceConfig(**settings).resolved()
    assert config == GuidanceConfig(**{**settings, **became})
    config.save(tmp_path)
    assert GuidanceConfig.load(tmp_path)[0] == config
    loss = GuidanceLoss(gpt2(), llama(), GuidanceConfig(**settings))
    assert loss.config == config
    assert loss.measures[0].name == config.measure


@pytest.mark.parametrize("axis", ["sequence", "token"])
@pytest.mark.parametrize("n", [32, 512])
@pytest.mark.parametrize("sketch", [None, 256])
def test_an_automatic_measure_starts_far_below_one_on_unrelated_features(axis: str, n: int, sketch: int | None) -> None:
    x, y = torch.randn(2, n, 2048, generator=torch.Generator().manual_seed(0))
    config = GuidanceConfig(sample_axis=axis, sketch=sketch).resolved()
    assert get_measure(config.measure, config.ridge_penalty)(x, y) < 0.1


def test_two_configs_share_no_list() -> None:
    GuidanceConfig().target_layers.append("h.0")
    assert GuidanceConfig().target_layers == ["hidden_states"]


# ------------------------------------------------------------------------------------------------------------- flags


def test_without_flags_both_classes_have_their_defaults() -> None:
    _, config = parse()
    assert config == GuidanceConfig()


def test_every_field_is_a_flag_beside_those_of_training_arguments() -> None:
    assert set(CHANGED) | set(PAIRS) | set(CACHED) == set(FIELDS)
    args, config = parse("--learning_rate", "0.25", *as_flags(CHANGED))
    assert config == GuidanceConfig(**CHANGED)
    assert args.learning_rate == 0.25
    assert all(getattr(config, name) != getattr(GuidanceConfig(), name) for name in CHANGED)


def test_pairs_are_a_flag() -> None:
    assert parse(*as_flags(PAIRS))[1].layer_pairs == PAIRS["layer_pairs"]


def test_a_mapping_given_by_hand_is_a_word_and_not_its_letters() -> None:
    assert parse("--layer_mapping", "even")[1].layer_mapping == "even"
    assert parse("--target_layers", "even")[1].target_layers == ["even"]
    with pytest.raises(ValueError, match=r"target_layers is 'even' \(str\); expected list\[str\]"):
        GuidanceConfig(target_layers="even")


def test_a_bad_flag_is_the_same_error_as_a_bad_value() -> None:
    with pytest.raises(ValueError, match="guidance_reduction is 'max'; possible are sum, mean"):
        parse("--guidance_reduction", "max")


# -------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("values", [{}, CHANGED, PAIRS, CACHED], ids=["defaults", "changed", "pairs", "cached"])
def test_json_gives_the_same_config_back(values: dict[str, Any], tmp_path: Path) -> None:
    config, guide = GuidanceConfig(**values), {"source": "timm/resnet18", "seed": 0, "fingerprint": "sha256:ab"}
    assert GuidanceConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    path = config.save(tmp_path, guide)
    assert path == tmp_path / "guidance_config.json"
    assert json.loads(path.read_text()) == {"guidance": config.to_dict(), "guide": guide}
    assert GuidanceConfig.load(tmp_path) == (config, guide)


def test_a_config_saved_without_a_guide_has_an_empty_section(tmp_path: Path) -> None:
    GuidanceConfig().save(tmp_path)
    assert GuidanceConfig.load(tmp_path) == (GuidanceConfig(), {})


def test_alone_every_step_is_guided_in_full() -> None:
    config = GuidanceConfig(guidance_every=3, guidance_warmup_steps=9, similarity_batch="global", eval_similarity=True)
    alone = config.alone()
    assert (alone.guidance_every, alone.guidance_warmup_steps, alone.similarity_batch) == (1, 0, "local")


def test_unknown_field_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"fields \['mesure', 'wieght'\]\. Did you mean 'measure'\? This version"):
        GuidanceConfig.from_dict({"wieght": 1, "mesure": "rsa", "guidance_weight": 1.0})


@pytest.mark.parametrize("content", ["[]", "{}", '{"guidance": {}}', '{"guidance": {}, "guide": {}, "more": 1}'])
def test_another_json_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "guidance_config.json").write_text(content)
    with pytest.raises(ValueError, match="is not a guidance config: expected the sections 'guidance' and 'guide'"):
        GuidanceConfig.load(tmp_path)


# -------------------------------------------------------------------------------------------------------- bad values

BAD = [
    ({"measure": "cka"}, "Unknown measure 'cka'; possible are linear_cka"),
    ({"log_measures": ["rsa", "cca"]}, "Unknown measure 'cca'"),
    ({"guidance_schedule": "step"}, "Unknown guidance_schedule 'step'; possible are constant, linear, cosine"),
    ({"layer_mapping": "random"}, "Unknown layer_mapping 'random'"),
    ({"guidance_weight": -0.1}, "guidance_weight is -0.1; it must be a finite number ≥ 0"),
    ({"guidance_weight": math.nan}, "guidance_weight is nan; it must be a finite number"),
    ({"guidance_weight": math.inf}, "guidance_weight is inf; it must be a finite number"),
    ({"prealign_steps": -1}, "prealign_steps is -1; it must be at least 0"),
    ({"calibration_batches": 0}, "calibration_batches is 0; it must be at least 1"),
    ({"guide_rows": 2}, "guide_rows is 2; it must be at least 3, as ridge_loo compares so many samples"),
    ({"guide_rows": 3, "measure": "debiased_cka"}, "guide_rows is 3; it must be at least 4"),
    ({"guide_rows": 2, "measure": "ridge"}, "guide_rows is 2; it must be at least 3"),
    ({"guide_rows": 0, "sample_axis": "token"}, r"guide_rows is 0; it must be at least 1\.$"),
    (
        {"sample_axis": "within", "cache_guide": "c", "sample_id_column": "id"},
        "on the sample alone, but sample_axis is 'within': set sample_axis='sequence', or leave cache_guide out",
    ),
    ({"guide_rows": 8, "similarity_batch": "accumulated"}, "compares all rows of all micro-batches: leave guide_rows"),
    (
        {"guide_rows": 8, "similarity_batch": "global", "guide_input": "shuffled"},
        "a process may have a single one of the guide_rows: leave guide_rows out",
    ),
    *(
        ({"sample_axis": "within", **own}, rf"sample_axis='within' compares each row by itself, .* takes no {name}")
        for own, name in (
            ({"sketch": 64}, "sketch=64"),
            ({"similarity_batch": "global"}, "similarity_batch='global'"),
            ({"similarity_batch": "accumulated"}, "similarity_batch='accumulated'"),
        )
    ),
    (
        {"sample_axis": "within", "cache_guide": "features", "sample_id_column": "id", "sketch": 64},
        "it takes no sketch=64: leave sketch out",
    ),
    ({"sample_axis": "within", "max_tokens": 2}, "max_tokens is 2; it must be at least 3"),
    ({"guide_rows": 1, "sample_axis": "token", "guide_input": "shuffled"}, "guide_rows is 1; it must be at least 2"),
    (
        {"layer_pairs": ["h.*~h.1"]},
        "layer_pairs names 'h.*', which may be several layers; a pair has one layer of each",
    ),
    ({"layer_pairs": ["h.1~encoder_hidden_states"]}, "layer_pairs names 'encoder_hidden_states', which may be several"),
    ({"skip_first_positions": -1}, "skip_first_positions is -1; it must be at least 0"),
    ({"max_tokens": 2, "measure": "ridge"}, "max_tokens is 2; it must be at least 3"),
    ({"max_tokens": 3, "measure": "debiased_cka"}, "max_tokens is 3; it must be at least 4"),
    (
        {"guidance_stop_step": 0},
        "guidance_stop_step is 0; it must be at least 1 .* For no guidance set guidance_weight",
    ),
    ({"guidance_stop_step": 5, "prealign_steps": 6}, r"not before the end of pre-alignment \(prealign_steps=6\)"),
    (
        {"prealign_steps": 5, "guidance_weight": 0.0},
        "prealign_steps trains on guidance alone, but guidance_weight is 0",
    ),
    ({"guide_input": "prealign_noise"}, "guide_input='prealign_noise' is for pre-alignment: set prealign_steps"),
    ({"target_layers": []}, r"target_layers is \[\]; name at least one layer, or 'hidden_states'"),
    ({"guide_layers": ["h.0", " "]}, r"guide_layers is \['h.0', ' '\]; name at least one layer"),
    ({"layer_pairs": []}, "layer_pairs is empty; name at least one pair, or leave it out"),
    ({"layer_pairs": ["h.0"]}, "layer pair 'h.0' is not of the form"),
    ({"layer_pairs": ["a~b", "a ~ b"]}, "layer_pairs names a pair twice"),
    ({"layer_pairs": ["a~b@1", "a~b@2"]}, "layer_pairs names a pair twice"),
    ({"layer_pairs": ["a~b@-1"]}, "layer pair 'a~b@-1' has the weight '-1'; write a finite number ≥ 0 after '@'"),
    (
        {"layer_pairs": ["a~b@0", "c~d@0"]},
        "layer_pairs gives every pair the weight 0: .* for no guidance set guidance_wei",
    ),
    ({"guidance_warmup_steps": -1}, "guidance_warmup_steps is -1; it must be at least 0"),
    (
        {"guidance_warmup_steps": 5, "prealign_steps": 2, "guidance_stop_step": 7},
        "guidance_warmup_steps is 5 after prealign_steps=2, but guidance stops at step 7, before it has its full",
    ),
    ({"guidance_stop_similarity": 0.0}, r"guidance_stop_similarity is 0\.0; it must be above 0 and at most 1"),
    ({"guidance_stop_similarity": 1.5}, r"guidance_stop_similarity is 1\.5; it must be above 0 and at most 1"),
    ({"guidance_stop_similarity": math.nan}, "guidance_stop_similarity is nan; it must be above 0 and at most 1"),
    (
        {"eval_similarity": True, "guidance_weight": 0},
        "guidance_weight is 0: there is nothing to measure. Set guidance_we",
    ),
    ({"eval_similarity": True, **CACHED}, "and validation rows have no ids: leave out eval_similarity or cache_guide"),
    ({**PAIRS, "guide_layers": ["layer1"]}, "layer_pairs already names the layers: leave target_layers and guide_la"),
    *(({name: "nonsense"}, f"{name} is 'nonsense'; possible are {', '.join(CHOICES[name])}") for name in CHOICES),
]


@pytest.mark.parametrize(("values", "words"), BAD, ids=[",".join(values) for values, _ in BAD])
def test_a_value_that_is_not_possible_is_an_error_that_says_what_is(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GuidanceConfig(**values)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses_a_value_of_another_type(name: str) -> None:
    for wrong in ({"a": 1}, ("hidden_states",), [1]):
        with pytest.raises(ValueError, match=re.escape(f"{name} is {wrong!r} ({type(wrong).__name__}); expected ")):
            GuidanceConfig(**{name: wrong})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("guidance_weight", "1", "float"),
        ("guidance_weight", None, "float"),
        ("guidance_weight", True, "float"),
        ("prealign_steps", 3.0, "int"),
        ("prealign_steps", False, "int"),
        ("save_guide", 1, "bool"),
        ("guidance_stop_step", "300", "Optional[int]"),
        ("guidance_stop_step", True, "Optional[int]"),
        ("measure", None, "str"),
        ("log_measures", "rsa", "list[str]"),
        ("layer_pairs", "a~b", "list[str]"),
    ],
)
def test_types_are_not_converted(name: str, value: Any, expected: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"{name} is {value!r} ({type(value).__name__}); expected ")
    ) as error:
        GuidanceConfig(**{name: value})
    assert expected.removeprefix("Optional[").rstrip("]") in str(error.value)


def test_a_whole_number_is_a_weight() -> None:
    assert GuidanceConfig(guidance_weight=2).guidance_weight == 2


def test_help_describes_every_field() -> None:
    words = " ".join((GuidanceConfig.__doc__ or "").split())
    for name, field in FIELDS.items():
        assert f" {name}: {' '.join(field.metadata['help'].split())}" in words


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("weight", "guidance_weight"),
        ("mesure", "measure"),
        ("stop_step", "guidance_stop_step"),
        ("layer_pair", "layer_pairs"),
    ],
)
def test_an_unknown_field_is_a_type_error_that_names_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(
        TypeError, match=rf"Unknown guidance fields \['{name}'\]\. Did you mean '{meant}'\? This version kno"
    ):
        GuidanceConfig(**{name: 1})
    with pytest.raises(TypeError, match="Unknown"):
        dataclasses.replace(GuidanceConfig(), **{name: 1})
    with pytest.raises(ValueError, match=f"Did you mean '{meant}'"):
        GuidanceConfig.from_dict({name: 1})
    with pytest.raises(TypeError, match=r"Unknown guidance fields \['qqq'\]\. This version knows measure, "):
        GuidanceConfig(qqq=1)  # type: ignore[call-arg]


def test_a_config_is_still_a_plain_dataclass() -> None:
    config = GuidanceConfig("rsa", guidance_weight=0.5)
    assert list(inspect.signature(GuidanceConfig).parameters) == list(FIELDS)
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), dataclasses.replace(config)):
        assert other == config
    assert repr(config).startswith("GuidanceConfig(measure='rsa', ridge_penalty=None, guidance_weight=0.5,")
    assert GuidanceConfig.__init__.__qualname__ == "GuidanceConfig.__init__"


@pytest.mark.parametrize("pairs", [[("h.1", "h.3")], (("h.1", "h.3"),), {"h.1": "h.3"}, [["h.1", "h.3"]], "h.1~h.3"])
def test_pairs_that_are_no_list_of_texts_are_told_how_to_write_them(pairs: Any) -> None:
    with pytest.raises(
        ValueError, match=r"layer_pairs is .*expected .*list\[str\].* as one text, such as \['h\.1~h\.3'\]\.$"
    ):
        GuidanceConfig(layer_pairs=pairs)


@pytest.mark.parametrize("name", ["target_layers", "guide_layers", "log_measures"])
def test_a_tuple_of_names_is_told_to_be_no_list(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is \('h\.1', 'h\.2'\) \(tuple\); expected list\[str\]\.$"):
        GuidanceConfig(**{name: ("h.1", "h.2")})


@pytest.mark.parametrize("name", ["cache_guide", "sample_id_column"])
def test_an_empty_name_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is ' '; name a \w+, or leave it out\.$"):
        GuidanceConfig(**{**CACHED, name: " "})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["hidden_states", "hidden_states.1"],
            r"'hidden_states\.1' twice \('hidden_states' has it, too\): leave one out",
        ),
        (["h.1", "h.2", "h.1"], r"'h\.1' twice \(each layer counts once\): leave one out"),
        (["encoder_hidden_states.2", "encoder_hidden_states"], r"'encoder_hidden_states\.2' twice"),
    ],
)
def test_a_layer_that_is_named_twice_is_an_error(names: list[str], words: str) -> None:
    for field in ("target_layers", "guide_layers"):
        with pytest.raises(ValueError, match=f"^{field} names {words}"):
            GuidanceConfig(**{field: names})
    GuidanceConfig(target_layers=["hidden_states.0", "hidden_states"])  # embeddings are not among the latter
