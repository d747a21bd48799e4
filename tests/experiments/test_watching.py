"""The intrinsic dimension of layers over training, measured at evaluations and drawn."""

from types import SimpleNamespace

import pytest
import torch
from builders import gpt2, hidden_states, token_batch

from hf_guidance.analysis.dimensions import intrinsic_dimension
from hf_guidance.analysis.history import dimension_curves
from hf_guidance.experiments import watching
from hf_guidance.experiments.watching import WatchedDimensions, plot_dimensions


def test_each_hidden_state_is_measured_in_evaluation_mode_and_nothing_is_left_behind():
    model, batch = gpt2().train(), token_batch(32)
    state = SimpleNamespace(global_step=5, log_history=[{"step": 5, "eval_loss": 1.0}])
    watching = WatchedDimensions({**batch, "guide_input_ids": torch.zeros(32, 2)})
    watching.on_evaluate(None, state, None, model=model)
    assert model.training
    assert not model._forward_hooks
    (point,) = dimension_curves(state.log_history)
    states = hidden_states(model.eval(), {"input_ids": batch["input_ids"]})
    assert point == {"step": 5} | {
        f"hidden_states.{i}": pytest.approx(intrinsic_dimension(states[i - 1]), rel=1e-4) for i in (1, 2)
    }
    watching.on_evaluate(None, state, None, model=model)  # the test at the last step
    assert len(dimension_curves(state.log_history)) == 1


def test_a_layer_most_of_whose_rows_are_alike_is_left_out():
    ids = torch.zeros(8, 4, dtype=torch.long)
    ids[0] = 1
    assert WatchedDimensions({"input_ids": ids}).measured(gpt2()) == {}


def test_the_mean_of_the_layers_is_drawn_for_each_run(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **kwargs: drawn.append((kwargs["label"], x, y)))
    monkeypatch.setattr(Axes, "legend", lambda self, **kwargs: None)
    points = [{"step": 2, "a": 1.0, "b": 3.0}, {"step": 4, "a": 5.0}]
    runs = [{"run": "alone", "seed": 0, "dimensions": points}, {"run": "trained_guide", "seed": 0, "dimensions": []}]
    assert plot_dimensions(runs, tmp_path / "d.png")
    assert drawn == [("alone", [2, 4], [2.0, 5.0])]
    assert not plot_dimensions(runs[1:], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_film_of_each_guided_run_is_drawn_for_its_first_seed(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(watching, "plot_film", lambda frames, path, title: drawn.append((frames, path, title)))
    runs = [
        {"run": "alone", "seed": 0},
        {"run": "trained_guide", "seed": 0, "film": {"0": "first", "10": "second"}},
        {"run": "trained_guide", "seed": 1, "film": {"0": "other"}},
    ]
    path = f"{tmp_path}/film-trained_guide.gif"
    assert watching.plot_films(runs, tmp_path) == [path]
    assert drawn == [({0: "first", 10: "second"}, path, "trained guide")]
