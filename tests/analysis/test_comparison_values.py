"""The similarities of two networks' layers, kept and drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import gpt2, llama, token_rows

from hf_guidance.analysis import Comparison, compare


def test_a_comparison_is_kept_and_drawn(tmp_path: Path) -> None:
    found = compare(gpt2(), llama(), token_rows(80), batch_size=8)
    found.save(tmp_path / "new" / "c.json")
    again = Comparison.load(tmp_path / "new" / "c.json")
    np.testing.assert_allclose(again.values, found.values)
    np.testing.assert_allclose(again.errors, found.errors)  # type: ignore[arg-type]
    assert again.layers_b == found.layers_b
    assert json.loads((tmp_path / "new" / "c.json").read_text())["samples"] == 80
    frame = found.to_pandas()
    assert frame.loc["hidden_states.1", "hidden_states.2"] == found.values[0, 1]
    figure = found.plot(tmp_path / "c.png", names=("GPT-2", "Llama"))
    panel = figure.axes[0]
    assert (panel.get_ylabel(), panel.get_xlabel()) == ("layers of GPT-2", "layers of Llama")
    assert len(panel.texts) == found.values.size
    assert panel.images[0].get_clim() == (-0.2, 1.0)
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_a_constant_layer_has_no_value_in_the_file_and_none_when_read(tmp_path: Path) -> None:
    found = Comparison(np.array([[0.5, np.nan]]), ["a"], ["b", "c"], "ridge", "token", 40, 1)
    found.save(tmp_path / "new" / "c.json")
    assert json.loads((tmp_path / "new" / "c.json").read_text())["values"] == [[0.5, None]]
    again = Comparison.load(tmp_path / "new" / "c.json")
    np.testing.assert_array_equal(again.values, found.values)
    assert again.errors is None
    assert again.to_pandas().isna().loc["a", "c"]
    assert found.plot().axes[0].get_title() == "40 tokens"


def test_what_only_the_extra_brings_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Comparison(np.zeros((1, 1)), ["a"], ["b"], "linear_cka", "sequence", 4, 1)
    for module, use in (("pandas", found.to_pandas), ("matplotlib.figure", found.plot)):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=r"(to_pandas|plot) needs .*: pip install 'hf_guidance\[recipes\]'"):
            use()
