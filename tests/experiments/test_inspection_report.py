"""The report of an inspection, and its proposal as YAML."""

from __future__ import annotations

import yaml
from test_proposals import measurements

from hf_guidance import GuidanceConfig
from hf_guidance.experiments import Inspection
from hf_guidance.experiments.inspection_report import as_text, as_yaml
from hf_guidance.experiments.measurements import PairMeasurement


def inspection(pairs: int = 1) -> Inspection:
    start = measurements(share=0.7)
    start.pairs.extend(PairMeasurement(f"t{i}", "g", start.pairs[0].similarities) for i in range(1, pairs))
    reasons = {"measure": "It is the best.", "guide_rows": "None is saved."}
    config = GuidanceConfig(measure="ridge_loo", ridge_penalty=0.1, guidance_every=2)
    return Inspection("Target", "Guide", 32, start, config, reasons, start, ["Take care."])


def test_the_report_has_pairs_layers_gradients_cost_warnings_and_the_proposal() -> None:
    lines = str(inspection()).splitlines()
    assert lines[0] == "Target guided by Guide, over 2 batches of 32 rows"
    assert lines[3].split() == ["pair", "ridge", "ridge_loo", "debiased_cka", "linear_cka", "room"]
    assert lines[4].split() == ["t~g", "0.500", "0.100", "0.020", "0.500", "0.90"]
    text = "\n".join(lines)
    for words in (
        "dead layers: none",
        "energy of a layer in 2 % of its samples: guide g (70 %)",
        "at weight 1: 1, at an angle of 0°",
        "CPU time of a step: target 1 s, guide's forward 0.5 s, guidance 0.1 s",
        "warning: Take care.",
        "  measure = ridge_loo: It is the best.",
        "  guide_rows = unset: None is saved.",
        "ridge_penalty = 0.1",
    ):
        assert words in text


def test_many_pairs_are_cut() -> None:
    assert "… 8 more pairs" in as_text(("T", "G"), 32, inspection(20).measured, [], inspection().proposal, {})


def test_yaml_has_what_was_chosen_and_what_differs_below_its_reason() -> None:
    text = as_yaml(inspection().proposal, inspection().reasons)
    assert yaml.safe_load(text) == {"measure": "ridge_loo", "ridge_penalty": 0.1, "guidance_every": 2}
    lines = text.splitlines()
    assert lines[1:3] == ["# It is the best.", "measure: ridge_loo"]


def test_small_numbers_and_names_stay_what_they_are() -> None:
    config = GuidanceConfig(guidance_weight=1e-5, guide_layers=["h.*", "Conv2d", "1"])
    assert GuidanceConfig(**yaml.safe_load(as_yaml(config, {}))) == config
