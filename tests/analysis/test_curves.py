"""The figure is drawn for what recipes hand it, and shows what it says."""

import pytest

from hf_guidance.analysis.curves import plot_comparison, plot_run


def run(name, seed, pairs=0):
    return {
        "run": name,
        "seed": seed,
        "curve": [{"step": s, "value": 0.1 * s + 0.01 * seed, "loss": 2.0 / s} for s in range(1, 4 + 2 * seed)],
        "training": [{"step": s, "loss": 1.0 / s} for s in (2, 4)],
        "similarity": [{"step": s} | {f"hidden_states.{p}~layer{p}": 0.3 * s for p in range(pairs)} for s in (1, 2, 3)]
        if pairs
        else [],
        "settings": {"guidance": {"measure": "linear_cka"} if pairs else None},
    }


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a comparison and returns its panels."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(results, **options):
        path = tmp_path / "figure.png"
        if isinstance(results, list) and "run" not in results[0]:
            plot_run(results, path, **options)
        else:
            plot_comparison(results, "accuracy", path, **options)
        assert path.read_bytes().startswith(b"\x89PNG")
        return figures[-1].axes

    return draw


def test_one_panel_of_curves_and_one_of_similarities_per_guided_run(drawn):
    results = [run("alone", 0), run("alone", 1), run("untrained_guide", 0, pairs=4), run("trained_guide", 0, pairs=20)]
    results[2]["guide"] = {"architecture": "GPT2Model", "untrained": True}
    curves, losses, few, many, *spare = drawn(results)
    assert [bar.get_yticklabels()[0].get_text() for bar in spare] == ["first of\n20 pairs"]
    legend = curves.figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [
        "alone",
        "guided by an untrained GPT-2",
        "trained guide",
    ]
    assert curves.get_legend() is None  # which would cover lines
    assert [line.get_color() for line in curves.lines] == ["0.3", "tab:blue", "tab:red"]
    assert list(curves.lines[0].get_ydata()) == pytest.approx([10.5, 20.5, 30.5])  # percent, mean over the seeds
    assert list(curves.lines[0].get_xdata()) == [1, 2, 3]  # where both have a value
    assert [list(line.get_ydata()) for line in losses.lines[:2]] == [pytest.approx([2, 1, 2 / 3]), [0.5, 0.25]]
    assert (len(few.lines), len(many.lines)) == (4, 20)
    assert few.get_legend() is not None
    assert many.get_legend() is None


def test_unguided_runs_alone_and_a_logarithmic_axis(drawn):
    curves, _ = drawn([run("alone", 0)], percent=False, log=True)
    assert curves.get_yscale() == "log"
    assert list(curves.lines[0].get_ydata()) == pytest.approx([0.1, 0.2, 0.3])


def test_a_last_panel_has_the_angle_of_the_gradients_where_it_was_logged(drawn):
    guided = [run("guided", seed, pairs=1) for seed in (0, 1)]
    for record, cosines in zip(guided, ([0.5, -0.1], [0.3, -0.3]), strict=True):
        record["gradients"] = [{"step": s, "ratio": 2.0, "cosine": c} for s, c in zip((2, 4), cosines, strict=True)]
    *_, last = drawn([run("alone", 0), *guided])
    assert "cosine" in last.get_ylabel()
    _, line = last.lines
    assert line.get_xydata().tolist() == [[2, pytest.approx(0.4)], [4, pytest.approx(-0.2)]]
    assert line.get_color() == "tab:blue"  # that of the run in the other panels
    assert len(drawn([run("alone", 0), run("guided", 0, pairs=1)])) == 3


def test_similarities_share_their_limits_and_what_lies_below_is_marked_with_its_value(drawn):
    guided = run("guided", 0, pairs=1) | {"similarity": [{"step": s, "a~b": v} for s, v in ((1, -0.75), (2, 0.5))]}
    guided["debiased"] = [{"step": 1, "value": 0.25}, {"step": 2, "value": 0.5}]
    *_, pairs = drawn([run("alone", 0), guided])
    assert pairs.get_ylim() == pytest.approx((-0.23, 1.03))
    _, mark, debiased = pairs.lines
    assert mark.get_xydata().tolist() == [[1, -0.2]]
    assert [text.get_text() for text in pairs.texts] == ["-0.75"]
    assert list(debiased.get_ydata()) == [0.25, 0.5]
    assert [text.get_text() for text in pairs.get_legend().get_texts()] == ["a ~ b", "debiased CKA, mean"]


def test_chance_is_named_and_a_far_one_does_not_flatten_the_curves(drawn):
    curves, _ = drawn([run("alone", 0)], chance=0.001)
    assert [text.get_text() for text in curves.figure.legends[0].get_texts()] == ["alone", "chance, 0.1 %"]
    assert curves.get_ylim()[0] > 5


def test_a_logarithmic_axis_has_plain_numbers_and_steps_are_whole(drawn):
    curves, losses = drawn([run("alone", 0)])
    curves.figure.canvas.draw()
    words = [label.get_text() for label in losses.get_yticklabels()]
    assert {"0.5", "1", "2"} <= set(words)
    assert all(tick == int(tick) for tick in curves.get_xticks())


def test_losses_that_are_close_have_ticks_with_equally_many_digits(drawn):
    points = [{"step": s, "value": 0.5, "loss": loss} for s, loss in ((1, 0.716), (2, 0.703), (3, 0.694))]
    close = run("alone", 0) | {"curve": points, "training": []}
    losses = drawn([close])[1]
    losses.figure.canvas.draw()
    words = [label.get_text() for label in losses.get_yticklabels() if label.get_text()]
    assert len(words) >= 3
    assert len({len(word) for word in words}) == 1


def test_a_curve_of_one_point_is_a_dot(drawn):
    short = run("alone", 0) | {"curve": [{"step": 1, "value": 0.5, "loss": 2.0}]}
    curves, losses = drawn([short])
    assert (curves.lines[0].get_marker(), losses.lines[0].get_marker()) == (".", ".")
    assert losses.lines[1].get_marker() == "None"  # of the training losses there are two


def test_a_single_run_is_drawn_from_its_log(drawn, tmp_path):
    log = [{"step": s, "loss": 9.0, "task/loss": 1.0 / s, "guidance/similarity/a~b": 0.1 * s} for s in (1, 2, 3)]
    log += [{"step": s, "eval_loss": 2.0 / s, "eval_accuracy": 0.2 * s, "eval_runtime": 5.0} for s in (2, 3)]
    losses, metric, pairs = drawn(log, measure="linear_cka")
    assert [list(line.get_ydata()) for line in losses.lines] == [
        pytest.approx([1, 2 / 3]),
        pytest.approx([1, 0.5, 1 / 3]),
    ]
    assert (metric.get_ylabel(), list(metric.lines[0].get_ydata())) == (
        "validation accuracy",
        pytest.approx([0.4, 0.6]),
    )
    assert (pairs.get_ylabel(), list(pairs.lines[0].get_ydata())) == ("linear CKA", pytest.approx([0.1, 0.2, 0.3]))
    assert len(drawn(log[:1])) == 2  # no validation
    del log[1]["guidance/similarity/a~b"]
    log[1]["guidance/similarity/c~d"] = 0.5
    pairs = drawn(log, measure="linear_cka")[2]
    assert [list(line.get_xdata()) for line in pairs.lines] == [[1, 3], [2]]
    assert not plot_run([{"step": 3, "train_runtime": 1.0}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
