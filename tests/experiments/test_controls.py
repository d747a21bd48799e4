"""The runs for which a trainer is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import gpt2, linear, llama, token_rows
from trainers import make_trainer

from hf_guidance.experiments.controls import CONTROLS, MatchedRun, check_follows

RUN = MatchedRun("guided", 7, True, "out")


def test_a_run_changes_the_setting_by_its_control_alone() -> None:
    config = linear(guidance_weight=0.5, on_non_finite="skip")
    assert RUN.guidance(config) == config
    for name, fields in CONTROLS.items():
        assert replace(RUN, control=name).guidance(config) == replace(config, **fields)
    alone = replace(RUN, guided=False).guidance(config)
    assert (alone.guidance_weight, alone.on_non_finite) == (0.0, "skip")
    with pytest.raises(ValueError, match="layer_pairs names the pairs"):
        replace(RUN, control="reversed_layers").guidance(linear(layer_pairs=["a~b"]))


def test_a_trainer_has_to_follow_its_run(tmp_path: Path) -> None:
    run = replace(RUN, output_dir=str(tmp_path))
    data = {"eval_dataset": token_rows(4)}
    guided, alone = make_trainer(tmp_path, gpt2(), llama(), **data), make_trainer(tmp_path, gpt2(), **data)
    check_follows(guided, run)
    check_follows(alone, replace(run, guided=False))
    wrong: tuple[tuple[Any, MatchedRun, str], ...] = (
        (alone, run, "a trainer without a guide; expected a guide"),
        (guided, replace(run, guided=False), "a trainer with a guide; expected no guide"),
        (guided, replace(run, max_steps=9), r"max_steps=3; expected 9: pass max_steps=run.max_steps .* not None"),
        (
            guided,
            replace(run, control="noise_guide"),
            r"guide_input='batch'; expected 'noise': pass guidance=run.guidance",
        ),
    )
    for trainer, other, said in wrong:
        with pytest.raises(ValueError, match=said):
            check_follows(trainer, other)
