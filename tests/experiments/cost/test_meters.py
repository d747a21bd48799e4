"""Meters of time, memory and arithmetic measure what they say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from costs import CPU, operations_of

from hf_guidance.experiments.cost.communication import Compared
from hf_guidance.experiments.cost.meters import StepMeter, busy_seconds, matmul_rate, peak_memory, products_alone
from hf_guidance.trainer.steps import Clock


def test_the_peak_is_of_what_is_held_at_once():
    with peak_memory(CPU) as peak:
        kept = torch.zeros(1000, 250)
        torch.zeros(1000, 500)
        torch.zeros(1000, 750)
    held = 4 * 1000 * (250 + 750)
    assert held <= peak.value < held + 100_000  # what Python itself takes
    assert kept.shape == (1000, 250)


def test_the_peak_has_numpys_memory_too():
    np.zeros(100)
    with peak_memory(CPU) as peak:
        np.zeros((1000, 500), np.float32)
        kept = torch.from_numpy(np.zeros((1000, 250), np.float32))
    assert 4 * 1000 * 500 <= peak.value < 4 * 1000 * 500 + 100_000
    assert kept.shape == (1000, 250)


def test_what_happens_every_so_many_steps_is_averaged_over_them():
    meter = StepMeter(Clock(CPU))
    meter._marks = [(0.0, float(seconds), [(0.0, seconds / 2), (1.0, 2.0)]) for seconds in (1, 5, 2, 8, 100)]
    meter.collect(cycle=2)
    assert meter.steps == [3.0, 5.0]
    assert meter.forwards == [2.5, 3.5]


def test_operations_and_rate_are_of_products():
    assert operations_of(torch.matmul, torch.ones(3, 5), torch.ones(5, 7)) == 2 * 3 * 5 * 7
    assert matmul_rate(CPU, torch.float32, repeats=1) > 1e8


def test_a_gpu_is_waited_for_before_and_after_its_work_is_added_up(monkeypatch):
    order = []

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            order.append("profile")
            return self

        def __exit__(self, *_):
            order.append("end")

        def events(self):
            kinds = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
            return [SimpleNamespace(device_type=kind, device_time=5e5) for kind in kinds]

    monkeypatch.setattr("torch.cuda.synchronize", lambda: order.append("wait"))
    monkeypatch.setattr("torch.profiler.profile", Profile)
    with busy_seconds(torch.device("cuda")) as busy:
        order.append("work")
    assert order == ["wait", "profile", "work", "wait", "end"]
    assert busy.value == 1.0
    with busy_seconds(CPU) as busy:
        pass
    assert busy.value is None


def test_products_alone_are_those_of_every_layer_and_the_gradient_of_the_targets(monkeypatch):
    class Counted:
        """A clock that has one second for each product."""

        def __init__(self, device):
            self.at = 0

        def now(self):
            self.at += 1
            return self.at

        def between(self, began, ended):
            return ended - began

    monkeypatch.setattr("hf_guidance.experiments.cost.meters.Clock", Counted)
    layers = [Compared(4, width, torch.float32, width == 8) for width in (6, 8, 6)]
    assert products_alone(layers, CPU) == 2 + 2
    assert products_alone([Compared(4, 6, torch.bfloat16, True)], CPU) == 2  # in float32, as a CPU makes them
    assert products_alone([Compared(20, 8, torch.float32, True)], CPU) == 0  # it stays features


def test_products_that_are_given_a_type_count_as_others():
    x = torch.empty(3, 4, 5, device="meta", dtype=torch.bfloat16)
    try:
        torch.mm(x[0], x[0].T, out_dtype=torch.float32)
    except TypeError:
        pytest.skip("this torch multiplies into another type on a GPU only")
    assert operations_of(torch.bmm, x, x.mT, out_dtype=torch.float32) == 2 * 3 * 4 * 5 * 4
    assert operations_of(torch.mm, x[0], x[0].T, out_dtype=torch.float32) == 2 * 4 * 5 * 4
