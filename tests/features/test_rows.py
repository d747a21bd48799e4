"""Rows of a batch: their content, and which of their positions are valid."""

import pytest
import torch

from hf_guidance.features.rows import content_of


def test_the_content_is_the_main_input_or_the_first_tensor_with_two_axes_or_else_with_one() -> None:
    ids, other = torch.zeros(2, 3), torch.ones(2, 4)
    assert content_of({"labels": other, "input_ids": ids}) is ids
    assert content_of({"id": torch.arange(2), "values": other}) is other
    user = torch.arange(2)
    assert content_of({"name": "x", "scale": torch.tensor(1.0), "user": user, "item": user + 1}) is user
    words = r"no tensor with a sample axis; it has \['name', 'scale'\]\. Guidance compares rows: let the data collator"
    with pytest.raises(ValueError, match=words):
        content_of({"name": "x", "scale": torch.tensor(1.0)})
