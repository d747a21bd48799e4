"""Maps are drawn with their layers, their values and their marked pairs."""

import pytest
from matplotlib.figure import Figure

from hf_guidance.analysis.heat_maps import FEW_LAYERS, plot_similarity_maps


def a_map(layers=2):
    return {
        "measure": "linear_cka",
        "target_layers": ["hidden_states.1", "hidden_states.2"],
        "guide_layers": [f"timm_model.{i}" for i in range(layers)],
        "similarity": [[0.25] * layers, [0.5] * layers],
        "pairs": ["hidden_states.1~timm_model.0", f"hidden_states.2~timm_model.{layers - 1}"],
    }


def run(name, seed, content):
    return {"run": name, "seed": seed, "similarity_maps": {"before": content, "after": content}}


@pytest.fixture
def saved(monkeypatch):
    """The figures that are saved."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_one_line_of_two_maps_for_each_guided_run(tmp_path, saved):
    results = [
        {"run": "alone", "seed": 0},
        run("guided", 0, a_map()),
        run("guided", 1, a_map()),
        run("other", 0, a_map()),
    ]
    assert plot_similarity_maps(results, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
    titles = [panel.get_title() for panel in saved[0].axes if panel.images]
    assert titles == [f"{name}, {when} training" for name in ("guided", "other") for when in ("before", "after")]
    assert not plot_similarity_maps(results[:1], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_map_shows_its_values_and_marks_its_pairs(tmp_path, saved):
    plot_similarity_maps([run("guided", 0, a_map()) | {"when": ("before training", "at step 3")}], tmp_path / "map.png")
    panel = saved[0].axes[1]
    assert panel.get_title() == "at step 3"
    assert panel.images[0].get_array().tolist() == [[0.25, 0.25], [0.5, 0.5]]
    assert panel.collections[0].get_offsets().tolist() == [[0, 0], [1, 1]]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["hidden_states.1", "hidden_states.2"]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["timm_model.0", "timm_model.1"]


def test_of_many_layers_only_some_are_named(tmp_path, saved):
    plot_similarity_maps([run("guided", 0, a_map(2 * FEW_LAYERS))], tmp_path / "map.png")
    names = [label.get_text() for label in saved[0].axes[0].get_xticklabels()]
    assert names == [f"timm_model.{i}" for i in range(0, 2 * FEW_LAYERS, 2)]
