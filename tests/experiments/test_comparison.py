"""A run of a recipe is checked, and trained in the folder of its name."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from builders import arguments, gpt2, linear, token_rows
from transformers import default_data_collator

from hf_guidance.experiments.comparison import carry_out, check_folder, run_folder
from hf_guidance.experiments.run import SETTINGS, Run, settings_of


def test_an_unguided_run_stops_at_a_loss_that_is_not_finite(tmp_path):
    def broken():
        network = gpt2()
        torch.nn.init.constant_(network.lm_head.weight, math.nan)
        return network

    rows = {name: token_rows(8) for name in ("train_dataset", "eval_dataset", "test_dataset")}
    nothing = dict.fromkeys(("processing_class", "compute_metrics", "preprocess_logits_for_metrics"))
    task = SimpleNamespace(**rows, **nothing, data_collator=default_data_collator, metric="loss")
    run = Run("alone", 0, model=broken)
    with pytest.raises(FloatingPointError, match="Optimizer step 1 is not finite: the task loss is nan"):
        carry_out(run, task, arguments(tmp_path), linear(), tmp_path, {})


def test_a_folder_with_other_settings_is_found_before_anything_is_built(tmp_path):
    run = Run("guided", 3, model=lambda: pytest.fail("built"), guide=lambda: pytest.fail("built"))
    place = run_folder(run, tmp_path)
    assert place == tmp_path / "seed-3" / "guided"
    args, data = arguments(tmp_path, learning_rate=0.5), {"rows": 2}
    check_folder(run, args, linear(), tmp_path, data, searched=False)  # there is none yet
    place.mkdir(parents=True)
    (place / SETTINGS).write_text(json.dumps(settings_of(gpt2(), args, linear().resolved(), data)))
    check_folder(run, args, linear(), tmp_path, data, searched=False)
    with pytest.raises(ValueError, match=r"holds a run with other settings: data\.rows was 2, is 3\. Give another"):
        check_folder(run, args, linear(), tmp_path, {"rows": 3}, searched=False)
    args.learning_rate = 0.25
    check_folder(run, args, linear(), tmp_path, data, searched=True)  # the rate is chosen later
    with pytest.raises(ValueError, match=r"learning_rate was 0\.5, is 0\.25"):
        check_folder(run, args, linear(), tmp_path, data, searched=False)
