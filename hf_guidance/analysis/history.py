"""The log history of a trainer as curves: losses, validation values, similarities of pairs over time."""

from __future__ import annotations

from typing import Any, TypedDict

Log = dict[str, float]
History = list[Log]


class SimilarityMap(TypedDict):
    """Similarity of every target layer (a row each) with every guide layer, as `similarity_map` makes it."""

    measure: str
    target_layers: list[str]
    guide_layers: list[str]
    similarity: list[list[float]]
    pairs: list[str]


class Curves(TypedDict, total=False):
    """Curves and maps of a run, as figures draw them; `when` titles its two maps."""

    run: str
    seed: int
    curve: list[dict[str, Any]]
    training: list[dict[str, Any]]
    similarity: list[dict[str, Any]]
    debiased: list[dict[str, Any]]
    guide: Any  # its identity; None without guidance
    gradients: list[dict[str, Any]]
    dimensions: list[dict[str, Any]]
    similarity_maps: dict[str, SimilarityMap]
    when: tuple[str, str]
    settings: dict[str, Any]


GUIDANCE = "guidance/"  # in the names of what is measured of guidance, in training and on validation data
SIMILARITY = "guidance/similarity/"
DEBIASED = "guidance/debiased_cka/"
DIMENSION = "dimension/"  # in the names of intrinsic dimensions of layers
# what Trainer logs for an evaluation beside the metrics
SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")


def run_in_words(name: str) -> str:
    """Write the name of a run for people: `guided-measure_rsa` becomes `guided, measure rsa`."""
    return name.replace("-", ", ").replace("_", " ")


def measure_in_words(name: str) -> str:
    """Write the name of a measure for people: `debiased_cka` becomes `debiased CKA`."""
    return name.replace("_", " ").replace("cka", "CKA")


def metrics_of(log: Log, split: str) -> dict[str, float]:
    """Return name → value of the task's metrics that a log entry holds for the split `eval` or `test`."""
    values = {name.removeprefix(f"{split}_"): value for name, value in log.items() if name.startswith(f"{split}_")}
    own = {name: value for name, value in values.items() if not name.endswith(SPEED) and GUIDANCE not in name}
    return {name: float(value) for name, value in own.items() if isinstance(value, (int, float))}


def training_curve(history: History) -> list[dict[str, Any]]:
    """Return points with `step` and `loss`, which is the loss of the task alone."""
    return [{"step": h["step"], "loss": h.get("task/loss", h["loss"])} for h in history if "loss" in h]


def similarity_curves(history: History) -> History:
    """Return points with `step` and the similarity of every pair, under the name of the pair."""
    return _points(history, SIMILARITY)


def debiased_curves(history: History) -> History:
    """Return points with `step` and the debiased CKA of every pair, where it was logged beside another measure."""
    return _points(history, DEBIASED)


def debiased_curve(history: History) -> list[dict[str, Any]]:
    """Return points with `step` and `value`, the mean debiased CKA of the pairs, where it was logged beside another."""
    points = debiased_curves(history)
    means = [[value for name, value in point.items() if name != "step"] for point in points]
    return [{"step": point["step"], "value": sum(own) / len(own)} for point, own in zip(points, means, strict=True)]


def dimension_curves(history: History) -> History:
    """Return points with `step` and the intrinsic dimension of every layer, under its name."""
    return _points(history, DIMENSION)


def _points(history: History, prefix: str) -> History:
    points = []
    for log in history:
        own = {name.removeprefix(prefix): value for name, value in log.items() if name.startswith(prefix)}
        points += [{"step": log["step"]} | own] if own else []
    return points


def gradient_curve(history: History) -> History:
    """Return points with `step`, `ratio` and `cosine` of the gradients of guidance and task, where they were logged."""
    names = {name: f"{GUIDANCE}gradient_{name}" for name in ("ratio", "cosine")}
    logs = [log for log in history if names["cosine"] in log]
    return [{"step": log["step"], **{name: log[key] for name, key in names.items()}} for log in logs]


def validation_curve(history: History, metric: str | None = None) -> tuple[str | None, list[dict[str, Any]]]:
    """Return the name of a metric, and points with `step`, its `value` and `loss`.

    Without a name, the first logged metric is taken. If only the loss was logged, the name and every value are None.
    """
    logs = [(log["step"], metrics_of(log, "eval")) for log in history if "eval_loss" in log]
    others = [name for _, values in logs for name in values if name != "loss"]
    metric = metric or next(iter(others), None)
    points = [
        {"step": step, "value": values.get(str(metric)), "loss": values["loss"]}
        for step, values in dict(logs).items()
        if metric is None or metric in values
    ]
    return metric, points
