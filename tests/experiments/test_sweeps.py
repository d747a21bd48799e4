"""Flags with several values: one run at each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import Recipe
from torch import nn

from hf_guidance import GuidanceConfig
from hf_guidance.experiments.run import Run
from hf_guidance.experiments.sweeps import check_given, settings_of_sweeps, swept, take_sweeps, with_lists
from hf_guidance.trainer.run_facts import command_facts


def test_only_guidance_flags_with_several_values_are_swept() -> None:
    words = [
        "recipe.py",
        "--seeds",
        "0",
        "1",
        "--measure",
        "ridge",
        "rsa",
        "--guide_layers",
        "a",
        "b",
        "--eval_guidance",
    ]
    rest = ["--guidance_weight", "0.3", "1", "--max_steps", "3"]
    words += rest
    assert take_sweeps(words) == {"measure": ["ridge", "rsa"], "guidance_weight": ["0.3", "1"]}
    assert " ".join(words) == (
        "recipe.py --seeds 0 1 --measure ridge --guide_layers a b --eval_guidance --guidance_weight 0.3 --max_steps 3"
    )
    again = ["--measure", "ridge", "rsa", "--measure", "linear_cka"]  # a claim's flag, and the one that replaces it
    assert take_sweeps(again) == {}
    with pytest.raises(ValueError, match="--cache_guide a b: one value is expected"):
        take_sweeps(["--cache_guide", "a", "b"])


def test_every_combination_is_a_setting_with_the_types_of_its_fields() -> None:
    sweeps = {"measure": ["ridge", "rsa"], "guidance_weight": ["0.3", "1e-2"], "guide_rows": ["4"]}
    settings = settings_of_sweeps(sweeps, GuidanceConfig())
    assert list(settings) == [
        f"measure_{measure}-guidance_weight_{weight}-guide_rows_4"
        for measure in ("ridge", "rsa")
        for weight in ("0.3", "0.01")
    ]
    assert list(settings.values())[1] == {"measure": "ridge", "guidance_weight": 0.01, "guide_rows": 4}
    assert settings_of_sweeps({}, GuidanceConfig()) == {}
    for wrong, said in (
        ({"measure": ["rsa", "cca"]}, "cca"),
        ({"guide_rows": ["4", "x"]}, "invalid int value: 'x'"),
        ({"measure": ["rsa", "ridge", "rsa"]}, "^--measure rsa ridge rsa names rsa twice: name each once"),
        ({"guidance_weight": ["1", "1.0"]}, r"^--guidance_weight 1 1\.0 names 1\.0 twice"),
    ):
        with pytest.raises(ValueError, match=said):
            settings_of_sweeps(wrong, GuidanceConfig())


def test_each_guided_run_is_made_at_each_setting_and_keeps_what_it_sets_itself() -> None:
    def network() -> nn.Module:
        return nn.Linear(1, 1)

    runs = [
        Run("alone", 3, network),  # type: ignore[arg-type]
        Run("guided", 3, network, guide=network),  # type: ignore[arg-type]
        Run("shuffled", 3, network, guide=network, guidance={"guide_input": "shuffled"}),  # type: ignore[arg-type]
    ]
    found = swept(
        lambda seed: runs, {"measure_a": {"measure": "a"}, "measure_b": {"measure": "b", "guide_input": "x"}}
    )(3)
    assert [(run.name, run.guidance) for run in found] == [
        ("alone", {}),
        ("guided-measure_a", {"measure": "a"}),
        ("guided-measure_b", {"measure": "b", "guide_input": "x"}),
        ("shuffled-measure_a", {"measure": "a", "guide_input": "shuffled"}),
        ("shuffled-measure_b", {"measure": "b", "guide_input": "shuffled"}),
    ]
    assert swept(lambda seed: runs, {})(3) is runs


def test_every_value_of_a_flag_that_is_swept_is_in_the_command_that_is_published() -> None:
    mappings, numbers = ["--layer_mapping", "even", "last_2"], ["--guidance_weight", "0.3", "1"]
    words = ["python", "recipe.py", *mappings, "--eval_similarity", "true", "false", *numbers]
    words += ["--guide_input", "batch", "noise", "--on_non_finite", "skip"]
    settings = settings_of_sweeps(take_sweeps(words[:]), GuidanceConfig())
    assert len(settings) == 16
    assert command_facts(words, with_lists(settings)) == {"command": " ".join(words), "command_is_cut": None}
    assert with_lists({})().to_dict() == GuidanceConfig().to_dict()


def runs_of(**guidance: dict[str, Any] | None) -> list[Run]:
    """The runs of a seed: name → what it sets itself; None for a run without a guide."""

    def network() -> nn.Module:
        return nn.Linear(1, 1)

    return [
        Run(name, 0, network, guide=None if own is None else network, guidance=own or {})  # type: ignore[arg-type]
        for name, own in guidance.items()
    ]


STOPPED = {"untrained_guide_stopped": {"guidance_stop_step": 1}}
NOISE = {"noise_guide": {"guide_input": "noise"}}
SHUFFLED = {"shuffled_guide": {"guide_input": "shuffled"}}


@pytest.mark.parametrize(
    ("runs", "sweeps", "settings", "said"),
    [
        (
            {"free": {}, **NOISE},
            {"guide_input": ["batch", "shuffled"]},
            {"guide_input": "batch"},
            "^--guide_input batch shuffled: the run noise_guide itself sets it to noise, and would be trained 2 times "
            r"alike\. Leave --guide_input out, or choose other --runs\.$",
        ),
        (
            {"alone": None},
            {"measure": ["ridge", "rsa"]},
            {"measure": "ridge"},
            r"^--measure ridge rsa: a guided run is made at each value, but none of the runs is guided \(alone\)",
        ),
        (
            {"alone": None, **STOPPED},
            {},
            {"guidance_stop_step": 2},
            "^--guidance_stop_step 2 would change nothing: of the guided runs untrained_guide_stopped sets it to 1.*"
            r"other --runs, or give --stop_step, whose value untrained_guide_stopped takes\.$",
        ),
        (
            {**NOISE, **SHUFFLED},
            {},
            {"guide_input": "noise"},
            "^--guide_input noise would change nothing: of the guided runs noise_guide sets it to noise, shuffled_g",
        ),
    ],
)
def test_a_flag_whose_field_the_chosen_runs_set_themselves_is_refused(
    runs: dict[str, Any], sweeps: dict[str, list[str]], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check_given(["runs", *settings], sweeps, GuidanceConfig(**settings), runs_of(**runs))


def test_a_flag_that_one_of_the_runs_takes_or_that_a_claim_gives_is_allowed() -> None:
    set_to = GuidanceConfig(guide_input="shuffled")
    check_given(["guide_input"], {}, set_to, runs_of(alone=None, free={}, **NOISE))
    check_given(["guide_input"], {}, set_to, runs_of(**SHUFFLED))  # the same value
    check_given(["guide_input"], {}, set_to, runs_of(alone=None))
    check_given(["runs"], {}, set_to, runs_of(**NOISE))
    check_given(["runs"], {"measure": ["ridge", "rsa"]}, GuidanceConfig(measure="ridge"), runs_of(alone=None))
    check_given(["measure"], {"measure": ["ridge", "rsa"]}, GuidanceConfig(measure="ridge"), runs_of(**NOISE))


def test_a_recipe_sweeps_and_compares_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {
        "max_steps": 2,
        "eval_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "eval_size": 8,
        "use_cpu": True,
        "runs": ["alone", "untrained_guide"],
    }
    recipe = Recipe("rnn_vs_transformer", tiny)
    recipe.run_here(monkeypatch, tmp_path / "out", layer_mapping=["even", "last_2"])
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    guided = [f"untrained_guide-layer_mapping_{mapping}" for mapping in ("even", "last_2")]
    assert [run["run"] for run in report["runs"]] == ["alone", *guided]
    assert [run["settings"]["guidance"]["layer_mapping"] for run in report["runs"][1:]] == ["even", "last_2"]
    for told in (report, report["runs"][1]["card"], report["runs"][2]["card"]):
        assert "--layer_mapping even last_2" in told["command"]
    assert [found["run"] for found in report["differences"]] == guided
    assert all((tmp_path / "out" / "seed-0" / name / "README.md").is_file() for name in guided)
    for name, flags, said in (
        (
            "reversed_layers",
            {"layer_mapping": ["even", "last_2"]},
            "reversed_layers itself sets it to reversed",
        ),
        (
            "untrained_guide_stopped",
            {"guidance_stop_step": 2, "max_steps": 4},
            "--guidance_stop_step 2 would change",
        ),
        ("alone", {"measure": ["ridge", "debiased_cka"]}, "none of the runs is guided"),
    ):
        with pytest.raises(ValueError, match=said):
            recipe.run_here(monkeypatch, tmp_path / name, runs=[name], **flags)
        assert not list(tmp_path.glob(f"{name}/seed-*"))
    with pytest.raises(ValueError, match="--measure: this recipe crosses targets with guides; give one value"):
        Recipe("which_prior", {"max_steps": 1, "use_cpu": True}).run_here(
            monkeypatch, tmp_path / "matrix", measure=["ridge", "debiased_cka"]
        )
