"""The metrics against scikit-learn and plain numpy, and that they need neither network nor files."""

import inspect

import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score

from hf_guidance.tasks import metrics
from hf_guidance.tasks.metrics import Accuracy, InMemoryMetric, Perplexity, TokenAccuracy

RNG = np.random.default_rng(0)
METRICS = [
    member
    for member in vars(metrics).values()
    if inspect.isclass(member) and issubclass(member, InMemoryMetric) and member is not InMemoryMetric
]


@pytest.mark.parametrize("metric_class", METRICS)
def test_metrics_are_evaluates_own_kind_and_stay_in_memory(metric_class):
    metric = metric_class()
    assert isinstance(metric, evaluate.Metric)
    assert metric.keep_in_memory
    assert metric.description == metric_class.__doc__


def test_accuracy_is_scikit_learns():
    predictions, references = RNG.integers(3, size=(2, 100))
    result = Accuracy().compute(predictions=predictions, references=references)
    assert result == {"accuracy": pytest.approx(accuracy_score(references, predictions))}


def test_token_accuracy_ignores_what_has_no_label():
    predictions, references = RNG.integers(3, size=(2, 100))
    references[::4] = -100
    right = sum(predictions[index] == references[index] for index in range(100) if index % 4)
    result = TokenAccuracy().compute(predictions=predictions, references=references)
    assert result == {"accuracy": pytest.approx(right / 75)}


def test_token_accuracy_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no token to score: all 3 references are -100"):
        TokenAccuracy().compute(predictions=[1, 2, 3], references=[-100] * 3)


def test_perplexity_of_known_probabilities():
    probabilities = np.array([0.5, 0.25, 0.125, 0.5])
    result = Perplexity().compute(predictions=-np.log(probabilities), tokens_per_word=2.0)
    per_token = np.prod(probabilities) ** (-1 / 4)
    assert result["perplexity"] == pytest.approx(per_token)
    assert result["word_perplexity"] == pytest.approx(per_token**2)


def test_batches_add_up():
    metric, losses = Perplexity(), RNG.random(50)
    metric.add_batch(predictions=losses[:20])
    metric.add_batch(predictions=losses[20:])
    result = metric.compute(tokens_per_word=1)
    assert result["perplexity"] == pytest.approx(np.exp(losses.mean()))
