"""Batch norm's statistics, estimated from training rows before an evaluation."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_guidance.experiments.batch_norm import ReestimatedBatchNorm, reestimate


class Network(nn.Module):
    """Dropout, which must be off, and two batch norms, the second of which sees what the first makes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=0.3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixel_values):
        return self.second(self.dropout(self.first(pixel_values)) ** 2)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(8, 3, generator=generator) * (1 + i), "labels": None} for i in range(3)]


def test_the_statistics_are_averages_over_the_batches(batches):
    model = Network()
    reestimate(model, batches)
    pixels = [batch["pixel_values"] for batch in batches]
    torch.testing.assert_close(model.first.running_mean, torch.stack([x.mean(0) for x in pixels]).mean(0))
    torch.testing.assert_close(model.first.running_var, torch.stack([x.var(0) for x in pixels]).mean(0))
    squares = [((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()) ** 2 for x in pixels]
    torch.testing.assert_close(model.second.running_mean, torch.stack([x.mean(0) for x in squares]).mean(0))


def test_nothing_else_changes(batches):
    model = Network().train()
    model.first.eval()  # frozen by its owner
    reestimate(model, batches)  # makes the buffers' counts those of the batches
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    reestimate(model, batches)
    torch.testing.assert_close(model.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in (model, model.first, model.second, model.dropout)] == [True, False, True, True]
    assert (model.first.momentum, model.second.momentum) == (0.1, 0.3)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("evaluate", "stop"), [(True, False), (False, True), (False, False)])
def test_it_runs_before_an_evaluation_and_at_the_end(batches, evaluate, stop):
    model = Network()
    control = SimpleNamespace(should_evaluate=evaluate, should_training_stop=stop)
    ReestimatedBatchNorm(batches).on_step_end(None, None, control, model=model)
    assert bool(model.first.running_mean.any()) == (evaluate or stop)


def test_a_network_without_batch_norm_is_not_run():
    reestimate(nn.Linear(2, 2), [{"pixel_values": None}])
