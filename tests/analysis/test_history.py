"""A Trainer's log as curves."""

from hf_guidance.analysis.history import (
    gradient_curve,
    metrics_of,
    run_in_words,
    similarity_curves,
    training_curve,
    validation_curve,
)

PAIR = "guidance/similarity/a~b"
HISTORY = [
    {"step": 1, "loss": 3.0, "task/loss": 2.0, PAIR: 0.25, "guidance/debiased_cka/a~b": 0.1},
    {"step": 2, "eval_loss": 1.5, "eval_accuracy": 0.5, "eval_runtime": 9.0, "eval_samples_per_second": 7.0},
    {"step": 2, "loss": 1.0},
    {"step": 3, "eval_loss": 1.25, "eval_accuracy": 0.75, "eval_note": "words"},
    {"step": 3, "test_accuracy": 1, "train_runtime": 5.0},
]


def test_the_training_curve_is_of_the_task_alone_where_that_is_logged() -> None:
    assert training_curve(HISTORY) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_the_name_of_a_run_of_a_sweep_reads_as_words() -> None:
    assert (
        run_in_words("trained_guide-measure_rsa-guidance_weight_0.1")
        == "trained guide, measure rsa, guidance weight 0.1"
    )


def test_similarities_are_points_by_the_names_of_the_pairs() -> None:
    assert similarity_curves(HISTORY) == [{"step": 1, "a~b": 0.25}]


def test_the_validation_curve_takes_the_first_metric_unless_one_is_named() -> None:
    points = [{"step": 2, "value": 0.5, "loss": 1.5}, {"step": 3, "value": 0.75, "loss": 1.25}]
    assert validation_curve(HISTORY) == ("accuracy", points)
    assert validation_curve(HISTORY, "loss")[1] == [{**p, "value": p["loss"]} for p in points]
    assert validation_curve([{"step": 1, "eval_loss": 2.0}]) == (None, [{"step": 1, "value": None, "loss": 2.0}])


def test_of_two_evaluations_at_one_step_the_last_counts() -> None:
    assert validation_curve([{"step": 1, "eval_loss": 2.0}, {"step": 1, "eval_loss": 4.0}])[1][0]["loss"] == 4.0


def test_metrics_are_numbers_and_no_speeds() -> None:
    assert metrics_of(HISTORY[1], "eval") == {"loss": 1.5, "accuracy": 0.5}
    assert metrics_of(HISTORY[3], "eval") == {"loss": 1.25, "accuracy": 0.75}
    assert metrics_of(HISTORY[4], "test") == {"accuracy": 1.0}


def test_similarities_on_validation_data_are_no_metrics_of_the_task() -> None:
    log = {"step": 1, "eval_guidance/similarity": 0.5, "eval_loss": 2.0, "eval_guidance/rsa/a~b": 0.25, "eval_f1": 0.75}
    assert metrics_of(log, "eval") == {"loss": 2.0, "f1": 0.75}
    assert metrics_of({"eval_near_guidance/similarity": 0.5, "eval_near_loss": 1.0}, "eval") == {"near_loss": 1.0}
    assert validation_curve([log])[0] == "f1"


def test_the_gradients_are_points_where_they_were_logged() -> None:
    log = {"step": 4, "loss": 1.0, "guidance/gradient_ratio": 2.0, "guidance/gradient_cosine": -0.5}
    assert gradient_curve([log, {"step": 5, "loss": 1.0}]) == [{"step": 4, "ratio": 2.0, "cosine": -0.5}]
