"""Tables and the figure of a measured cost show its numbers."""

import re

from hf_guidance.experiments.cost.table import cost_tables, plot_overhead


def test_how_long_a_gpu_is_at_work_is_its_own_table(measured):
    row = measured | {"name": "4/32/8", "goal": None, "batch_size": 4}
    assert "at work" not in cost_tables([row])  # on a CPU there is no such time
    seconds = {"plain": 0.02, "guide": 0.01, "guided": 0.033, "paper": 0.09, "overhead": 1.1}
    table = cost_tables([row | {"busy": seconds}]).split("at work")[1]
    assert "| setting | plain  | guide  | guided | paper  | overhead |" in table
    assert "| 4/32/8  | 0.0200 | 0.0100 | 0.0330 | 0.0900 | 1.100    |" in table


def test_tables_and_figure(measured, tmp_path):
    row = {"name": "4/32/8", "batch_size": 4, "goal": 1.08, **measured}
    text = cost_tables([row])
    assert text.count("| 4/32/8 ") == 4
    assert re.search(r"\| 4/32/8 +\| [\d.]+ +\| [\d.]+ +\| [\d.]+ +\| [\d.]+ +\| [\d.]+ +\| [\d.]+ +\|\n", text)
    assert f" {measured['overhead']['median']:.3f} " in text
    of_rounds = measured["overhead_of_rounds"]
    assert f" {of_rounds['mean']:.3f} ± {of_rounds['standard_error']:.3f} " in text
    assert " ≤ 1.08 " in text
    assert f" {measured['memory']['peak']['guided'] / 2**20:.0f} " in text
    without = {key: value for key, value in row.items() if key not in ("paper", "arithmetic", "paper_overhead")}
    peaks = {name: value for name, value in row["memory"]["peak"].items() if name != "paper"}
    without |= {"goal": None, "memory": {**row["memory"], "peak": {**peaks, "plain": None}}}
    assert "paper" not in cost_tables([without])
    assert " – " in cost_tables([without])
    held = row["memory"]["peak"]["guided"]
    for bound, over in ((held - 1, True), (held, False)):
        memory = {**row["memory"], "plain_guide_layer_5_percent": bound}
        assert ("(exceeded)" in cost_tables([{**row, "memory": memory}])) == over
    plot_overhead([row, {**row, "batch_size": 8}], tmp_path / "overhead.png")
    assert (tmp_path / "overhead.png").stat().st_size > 5_000


def test_of_rows_with_and_without_a_goal_each_stands_in_one_table(measured):
    rows = [{**measured, "batch_size": 4, "name": name, "goal": goal} for name, goal in (("a", None), ("b", 1.08))]
    of_times = cost_tables(rows).split("\n\n")[1].splitlines()
    assert of_times[0].endswith("| goal   |")
    assert [line.split("|")[-2].strip() for line in of_times[2:]] == ["–", "≤ 1.08"]


def test_settings_of_another_size_are_drawn_as_another_line(measured, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **kwargs: figures.append(figure))
    sizes = [(64, 32, 8), (64, 64, 8), (128, 64, 8)]
    rows = [{**measured, "batch_size": b, "image_size": i, "width": w} for b, i, w in sizes]
    plot_overhead(rows, tmp_path / "overhead.png")
    plot_overhead([{**row, "guide_forwards": 0.0} for row in rows[1:]], tmp_path / "overhead.png")
    several, one = (figure.axes[0] for figure in figures)
    lines = {line.get_label(): len(line.get_xdata()) for line in several.lines}
    assert (lines["guided, 32 / 8"], lines["guided, 64 / 8"], lines["paper's formulation, 64 / 8"]) == (1, 2, 2)
    assert [line.get_label() for line in one.lines][:2] == ["guided", "paper's formulation"]
    assert (several.get_ylabel(), one.get_ylabel()) == ("step / (plain step + guide forward)", "step / plain step")
