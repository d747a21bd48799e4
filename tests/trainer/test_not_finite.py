"""Values that are not finite are named with their places, those of all processes together."""

from __future__ import annotations

import torch

from hf_guidance.similarity.layers import layer_of
from hf_guidance.trainer.not_finite import GRADIENT, guide_layers_to_check, join, not_finite, words_for

NAN = float("nan")


def test_losses_are_named_with_their_places_and_the_gradient_alone() -> None:
    seen = [
        ("micro-step 0", ["task loss", "ridge of a~b"], torch.tensor([NAN, 0.5])),
        ("micro-step 1", ["task loss", "ridge of a~b"], torch.tensor([1.0, float("-inf")])),
        ("", [GRADIENT], torch.tensor([NAN])),
    ]
    losses, gradients = words_for(seen, None)
    assert losses == ["the task loss is nan (micro-step 0)", "the ridge of a~b is -inf (micro-step 1)"]
    assert gradients == ["the norm of the gradient is nan"]
    assert words_for(seen, 3)[0][0] == "the task loss is nan (micro-step 0, rank 3)"
    assert words_for([("", ["task loss"], torch.tensor([NAN]))], None)[0] == ["the task loss is nan"]


def test_of_all_processes_losses_come_first_and_a_common_gradient_is_named_once() -> None:
    gradient = "the norm of the gradient is nan"
    assert join([([], [gradient]), ([], [gradient])]) == gradient
    assert join([([], [gradient]), (["the task loss is nan (rank 1)"], [gradient])]) == "the task loss is nan (rank 1)"
    many = [f"the task loss is nan (rank {rank})" for rank in range(7)]
    assert join([([word], []) for word in many]) == "; ".join(many[:5]) + "; and 2 more"


def test_the_error_says_what_was_done_and_what_to_do() -> None:
    error = not_finite(4, "the task loss is nan", "It was not taken.", may_skip=True)
    assert isinstance(error, FloatingPointError)
    assert str(error) == (
        "Optimizer step 4 is not finite: the task loss is nan. It was not taken. Lower the learning rate, check the "
        "data, or leave such steps out with on_non_finite='skip'."
    )
    assert str(not_finite(4, "x", "Done.", may_skip=False)).endswith("Lower the learning rate, or check the data.")
    of_guide = not_finite(1, "the guide layer h is nan", "Done.", may_skip=False)
    assert "It is the frozen guide that is not finite, whatever the learning rate" in str(of_guide)


def test_a_layer_of_the_guide_is_nan_if_any_of_its_values_is_not_finite() -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    broken = x.clone()
    broken[2, 1] = float("inf")
    checked = guide_layers_to_check({"a": [layer_of(x)], "b": [layer_of(x), layer_of(broken)]})
    assert checked["guide layer a"].item() == 0
    assert checked["guide layer b"].isnan()
