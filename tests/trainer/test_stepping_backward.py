"""Optimizers that take their steps inside the backward pass are known; what such a run does, `test_steps.py` shows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.training_args import OptimizerNames

from hf_guidance.trainer.stepping_backward import check_may_skip, what_steps_backward


def test_every_optimizer_of_transformers_that_steps_inside_the_backward_pass_is_known() -> None:
    found = {name.value for name in OptimizerNames if what_steps_backward(name.value)}
    layerwise = {name.value for name in OptimizerNames if "layerwise" in name.value}
    assert found == {"lomo", "adalomo", *layerwise}
    assert "galore_adamw_layerwise" in found


def test_hooks_on_complete_gradients_are_counted_and_others_are_not() -> None:
    network = nn.Linear(2, 2)
    assert not what_steps_backward("adamw_torch", network)
    network.weight.register_hook(torch.clone)
    assert not what_steps_backward("adamw_torch", network)
    network.weight.register_post_accumulate_grad_hook(lambda weight: None)
    assert what_steps_backward("adamw_torch", network).startswith("1 weights have hooks")


def test_only_a_step_inside_the_backward_pass_cannot_be_left_out() -> None:
    check_may_skip(True, "")
    check_may_skip(False, "the optimizer lomo takes its steps inside the backward pass")
    with pytest.raises(ValueError, match="cannot leave a step out here: the optimizer lomo"):
        check_may_skip(True, what_steps_backward("lomo"))
