"""The cost of guidance: what is measured is the real step, the table adds up, the yardstick is the paper's."""

import copy
import re
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import arguments, cka, gpt2, gradients, guidance_by_hand, llama, module_outputs, token_batch
from torch import nn
from transformers import Trainer

from hf_guidance import GuidanceConfig, GuidanceLoss, GuidanceTrainer, load_guide
from hf_guidance.experiments.cost.communication import Compared, bytes_of_global_batch, compared_features
from hf_guidance.experiments.cost.measuring import Plan, _padded, measure_cost
from hf_guidance.experiments.cost.meters import (
    Reading,
    StepMeter,
    busy_seconds,
    matmul_rate,
    operations,
    peak_memory,
    products_alone,
)
from hf_guidance.experiments.cost.paper_formulation import PaperTrainer
from hf_guidance.experiments.cost.paper_formulation import cka as paper_cka
from hf_guidance.experiments.cost.random_rows import random_images, random_tokens
from hf_guidance.experiments.cost.ratios import overhead_of_rounds, summary
from hf_guidance.experiments.cost.settings import Networks, Setting, parse_rows
from hf_guidance.experiments.cost.table import cost_tables, plot_overhead
from hf_guidance.experiments.cost.variants import Steps
from hf_guidance.targets.vision import vision_target
from hf_guidance.trainer.clock import Clock

CPU = torch.device("cpu")
QUICK = Plan(rounds=2, steps=2)
CONVS = GuidanceConfig(guide_layers=["Conv2d"])


def operations_of(work, *args, **kwargs):
    with operations() as count:
        work(*args, **kwargs)
    return count.value


def texts():
    return random_tokens(8, 6, 17)


@pytest.fixture(scope="module")
def resnet():
    return load_guide("timm/resnet10t", untrained=True)


def fcn():
    torch.manual_seed(0)
    return vision_target("deep_fcn", 32, width=8, depth=3, num_labels=4)


# ------------------------------------------------------------------------------------------------------ the yardstick


def test_the_yardsticks_loss_is_one_minus_cka_summed_over_the_pairs(tmp_path):
    target, guide, batch = gpt2(), llama().eval(), token_batch()
    trainer = PaperTrainer(model=target, args=arguments(tmp_path), guide=guide, guidance=GuidanceConfig())
    target.train()
    found = trainer.paper_loss(target, batch)
    torch.testing.assert_close(found.double(), guidance_by_hand(target, guide, batch), rtol=1e-4, atol=0)


def test_the_yardsticks_loss_and_gradients_on_images_are_those_of_the_guidance_loss(tmp_path, resnet):
    target, guide, batch = fcn().train().double(), copy.deepcopy(resnet).double(), random_images(8, 32, 4)[:8]
    batch["pixel_values"] = batch["pixel_values"].double()
    trainer = PaperTrainer(model=target, args=arguments(tmp_path), guide=guide, guidance=CONVS)
    guidance = GuidanceLoss(target, guide, CONVS)
    with guidance.watch(batch) as watched:
        target(**watched.inputs)
    convs = [name for name, module in guide.named_modules() if isinstance(module, nn.Conv2d)]
    theirs = module_outputs(guide, convs, batch["pixel_values"])
    ours = target(batch["pixel_values"], output_hidden_states=True).hidden_states[1:]
    even = [int(i * 2 / (len(convs) - 1) + 0.5) for i in range(len(convs))]
    by_hand = sum(1 - cka(ours[t], features) for t, features in zip(even, theirs, strict=True))
    paper = trainer.paper_loss(target, batch)
    torch.testing.assert_close(paper, by_hand, rtol=1e-9, atol=0)
    expected = gradients(target, watched.loss)
    assert max(gradient.abs().max() for gradient in expected) > 1e-3
    torch.testing.assert_close(gradients(target, paper), expected, rtol=1e-6, atol=1e-9)


def test_a_pair_costs_the_yardstick_six_grams_and_twelve_square_products():
    x, y = torch.randn(5, 11), torch.randn(5, 7)
    assert operations_of(paper_cka, x, y) == 3 * 2 * 5 * 5 * (11 + 7) + 12 * 2 * 5**3


def test_the_yardstick_runs_the_target_twice_a_step_and_adds_the_weighted_sum(tmp_path):
    config = GuidanceConfig(guidance_weight=0.5, layer_pairs=["hidden_states.2~hidden_states.1"])
    target, guide = gpt2(), llama().eval()
    trainer = PaperTrainer(model=target, args=arguments(tmp_path), guide=guide, guidance=config)
    runs = []
    target.register_forward_pre_hook(lambda *_: runs.append(1))
    target.train()
    batch = token_batch()
    loss = trainer.compute_loss(target, batch)
    assert len(runs) == 2
    ours = target(**batch, output_hidden_states=True).hidden_states[2]
    theirs = guide(batch["input_ids"], output_hidden_states=True).hidden_states[1]
    expected = target(**batch).loss + 0.5 * (1 - cka(ours, theirs))
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-4, atol=0)


# --------------------------------------------------------------------------------------------------------- the meters


def test_the_clock_of_a_cpu_is_that_of_its_work_and_not_of_waiting():
    clock = Clock(CPU)
    began = clock.now()
    time.sleep(0.2)
    assert clock.between(began, clock.now()) < 0.1


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


def test_a_timed_trainer_takes_the_steps_that_it_takes_untimed(tmp_path):
    def trained(timed):
        options = {"guide": llama(), "guidance": GuidanceConfig(), "train_dataset": texts()}
        trainer = GuidanceTrainer(gpt2(), arguments(tmp_path, max_steps=3), **options)
        if timed:
            steps = Steps(trainer, discard=1, cycle=1)
            steps.advance(3)
            assert len(steps.meter.steps) == len(steps.meter.forwards) == 2
            assert all(0 < f < s for f, s in zip(steps.meter.forwards, steps.meter.steps, strict=True))
        else:
            trainer.train()
        return trainer.model.state_dict()

    expected, found = trained(False), trained(True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@contextmanager
def forty_two(open_ones):
    open_ones.append(1)
    reading = Reading()
    yield reading
    reading.value = 42
    open_ones.pop()


def test_counted_steps_are_read_one_by_one_and_then_timed_again(tmp_path):
    steps, inside = Steps(Trainer(gpt2(), arguments(tmp_path), train_dataset=texts()), discard=2, cycle=1), []
    assert steps.read(partial(forty_two, inside), 3) == [42, 42, 42]
    assert (inside, steps.meter.steps) == ([], [])
    steps.advance(3)
    assert len(steps.meter.steps) == 1


def test_a_reading_may_begin_where_the_step_before_ended(tmp_path):
    class Fetches(Trainer):
        def get_batch_samples(self, *args, **kwargs):
            order.append(f"fetch in {len(inside)}")
            return super().get_batch_samples(*args, **kwargs)

        def compute_loss(self, *args, **kwargs):
            order.append(f"step in {len(inside)}")
            return super().compute_loss(*args, **kwargs)

    order, inside = [], []
    steps = Steps(Fetches(gpt2(), arguments(tmp_path), train_dataset=texts()), discard=1, cycle=1)
    assert steps.read(partial(forty_two, inside), 2, fetching=True) == [42, 42]
    assert (order[:6], inside) == (["fetch in 0", "step in 0", *["fetch in 1", "step in 1"] * 2], [])
    order.clear()
    assert steps.read(partial(forty_two, inside), 1) == [42]
    assert order[:4] == ["fetch in 0", "step in 0", "fetch in 0", "step in 1"]


def test_a_step_that_fails_leaves_nothing_measuring(tmp_path):
    class Fails(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.state.global_step == 2:
                raise RuntimeError("out of memory")
            return super().compute_loss(model, inputs, *args, **kwargs)

    steps, inside = Steps(Fails(gpt2(), arguments(tmp_path), train_dataset=texts()), discard=1, cycle=1), []
    with pytest.raises(RuntimeError, match="out of memory"):
        steps.read(partial(forty_two, inside), 3)
    assert inside == []
    steps.advance(2)
    assert len(steps.meter.steps) == 1


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


# ------------------------------------------------------------------------------------------------------ the measurement


@pytest.fixture(scope="module")
def measured(tmp_path_factory, resnet):
    args = arguments(tmp_path_factory.mktemp("cost"))
    plan = Plan(rounds=2, steps=2, arithmetic=True)
    return measure_cost(fcn(), resnet, random_images(8, 32, 4), args, CONVS, plan)


def test_the_table_adds_up(measured, resnet):
    plain, guide, guided = (measured[name]["median"] for name in ("plain", "guide", "guided"))
    assert plain + sum(measured["split"].values()) == pytest.approx(guided)
    assert measured["split"]["guide_forward"] == guide
    for kind in ("median", "minimum"):
        floor = measured["plain"][kind] + measured["guide"][kind]
        assert measured["floor"][kind] == pytest.approx(floor)
        assert measured["overhead"][kind] == pytest.approx(measured["guided"][kind] / floor)
        assert measured["paper_overhead"][kind] == pytest.approx(measured["paper"][kind] / floor)
        assert measured["guided_over_plain"][kind] == pytest.approx(measured["guided"][kind] / measured["plain"][kind])
    assert measured["guided"]["samples_per_second"] == pytest.approx(4 / guided)
    for name in ("plain", "guide", "guided", "paper"):
        assert len(measured[name]["all"]) == 4
        assert measured[name]["minimum"] == min(measured[name]["all"])
    assert measured["guide_forwards"] == 1
    assert measured["pairs"] == sum(isinstance(module, nn.Conv2d) for module in resnet.modules())


@pytest.mark.parametrize("sketch", [None, 4, 100])
def test_a_global_batch_sends_each_paired_layers_features_or_their_sketch(resnet, sketch):
    batch = {"pixel_values": torch.randn(12, 3, 32, 32), "labels": torch.zeros(12, dtype=torch.long)}
    convolutions = [name for name, module in resnet.named_modules() if isinstance(module, nn.Conv2d)]
    outputs = module_outputs(resnet, convolutions, batch["pixel_values"])
    widths = [8, 8, 8, *(output[0].numel() for output in outputs)]  # three target layers, all of them paired
    sent = 12 * 4 * sum(min(sketch or width, width) for width in widths)
    assert bytes_of_global_batch(fcn(), resnet, CONVS, nullcontext, batch, sketch) == sent
    assert bytes_of_global_batch(fcn(), resnet, CONVS, nullcontext, batch, 10**6) is None


def test_features_in_half_precision_are_half_the_bytes_unless_they_are_sketched(resnet):
    batch = {"pixel_values": torch.randn(12, 3, 32, 32), "labels": torch.zeros(12, dtype=torch.long)}
    sent = [
        bytes_of_global_batch(fcn(), resnet, CONVS, partial(torch.autocast, "cpu", torch.bfloat16, on), batch, None)
        for on in (False, True)
    ]
    of_target = 12 * 4 * 3 * 8  # which is not run in autocast here
    assert sent[1] - of_target == (sent[0] - of_target) / 2


def test_the_memory_of_a_step_is_at_least_its_weights_and_gradients(measured, resnet):
    weights = 4 * sum(p.numel() for p in fcn().parameters())
    guide = 4 * sum(p.numel() for p in resnet.parameters())
    peak = measured["memory"]["peak"]
    assert peak["plain"] > 4 * weights  # and gradients and two moments
    assert peak["guide"] > guide
    assert peak["guided"] > peak["plain"] + guide
    assert peak["paper"] > peak["plain"] + guide
    layer = measured["memory"]["largest_guide_layer"]
    assert layer == 4 * 4 * 64 * 16 * 16  # the stem's last: float32, 4 rows, 64 channels, 16 × 16 pixels
    bound = 1.05 * (peak["plain"] + measured["memory"]["guide_weights"] + layer)
    assert measured["memory"]["plain_guide_layer_5_percent"] == round(bound)


def test_the_arithmetic_is_that_of_the_networks(measured, resnet):
    count = measured["arithmetic"]["operations"]
    sizes = [(3 * 32 * 32, 8), (8, 8), (8, 8), (8, 4)]
    forward = sum(2 * 4 * a * b for a, b in sizes)
    backward = 2 * forward - 2 * 4 * sizes[0][0] * sizes[0][1]  # the images need no gradient
    assert count["plain"] == forward + backward
    assert count["guided"] == count["plain"] + count["guide"] + count["grams"]
    convolutions = [name for name, module in resnet.named_modules() if isinstance(module, nn.Conv2d)]
    widths = [output[0].numel() for output in module_outputs(resnet, convolutions, torch.randn(4, 3, 32, 32))]
    assert count["grams"] == 2 * 4 * 4 * (sum(widths) + 3 * 8) + 2 * 4 * 4 * 3 * 8  # and the backward of the target's
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.zeros(4, dtype=torch.long)}
    expected = [Compared(4, width, torch.float32, of_target=False) for width in widths]
    expected += [Compared(4, 8, torch.float32, of_target=True)] * 3
    assert compared_features(fcn(), resnet, CONVS, nullcontext, batch) == expected
    rate = measured["arithmetic"]["operations_per_second"]["step"]
    assert measured["arithmetic"]["floor_seconds"] == pytest.approx((count["plain"] + count["guide"]) / rate)


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
    monkeypatch.setattr("hf_guidance.similarity.representation.starts_slowly", lambda x, thin=False: False)
    layers = [Compared(4, width, torch.float32, width == 8) for width in (6, 8, 6)]
    assert products_alone(layers, CPU) == 2 + 2
    assert products_alone([Compared(4, 6, torch.bfloat16, True)], CPU) == 2  # in float32, as a CPU makes them
    monkeypatch.setattr("hf_guidance.similarity.representation.starts_slowly", lambda x, thin=False: True)
    assert products_alone(layers, CPU) == 1 + 2  # those of one shape are made together


def test_products_that_are_given_a_type_count_as_others():
    x = torch.empty(3, 4, 5, device="meta", dtype=torch.bfloat16)
    assert operations_of(torch.bmm, x, x.mT, out_dtype=torch.float32) == 2 * 3 * 4 * 5 * 4
    assert operations_of(torch.mm, x[0], x[0].T, out_dtype=torch.float32) == 2 * 4 * 5 * 4


def test_what_was_measured_is_kept_though_the_arithmetic_fails(tmp_path, monkeypatch, caplog):
    def fails(*args):
        raise TypeError("no such operation")

    monkeypatch.setattr("hf_guidance.experiments.cost.measuring.matmul_rate", fails)
    plan = Plan(rounds=1, steps=1, paper=False, arithmetic=True)
    found = measure_cost(gpt2(), llama(), texts(), arguments(tmp_path), GuidanceConfig(), plan)
    assert found["overhead"]["median"] > 0
    assert "arithmetic" not in found
    assert "what was measured is kept" in caplog.text


def test_how_long_a_gpu_is_at_work_is_its_own_table(measured):
    row = measured | {"name": "4/32/8", "goal": None, "batch_size": 4}
    assert "at work" not in cost_tables([row])  # on a CPU there is no such time
    seconds = {"plain": 0.02, "guide": 0.01, "guided": 0.033, "paper": 0.09, "overhead": 1.1}
    table = cost_tables([row | {"busy": seconds}]).split("at work")[1]
    assert "| setting | plain  | guide  | guided | paper  | overhead |" in table
    assert "| 4/32/8  | 0.0200 | 0.0100 | 0.0330 | 0.0900 | 1.100    |" in table


def test_a_guide_that_no_step_runs_leaves_the_plain_step_as_the_floor(tmp_path):
    plan = Plan(rounds=1, steps=1, paper=False)
    found = measure_cost(gpt2(), llama(), texts(), arguments(tmp_path), GuidanceConfig(guidance_weight=0.0), plan)
    assert found["guide_forwards"] == 0
    assert found["overhead"] == found["guided_over_plain"]
    assert found["split"]["guide_forward"] == found["global_bytes"]["exact"] == 0
    assert "paper" not in found


@pytest.mark.parametrize("how", [{"guidance_every": 2}, {"guidance_stop_step": 1}], ids=lambda how: next(iter(how)))
def test_only_counted_steps_count_the_guides_forwards(how, tmp_path):
    plan = Plan(rounds=1, steps=1, paper=False, arithmetic=True)  # the discarded step is guided
    found = measure_cost(gpt2(), llama(), texts(), arguments(tmp_path), GuidanceConfig(**how), plan)
    always = measure_cost(gpt2(), llama(), texts(), arguments(tmp_path), GuidanceConfig(), plan)
    assert always["guide_forwards"] == 1
    assert found["guide_forwards"] == (0.5 if "guidance_every" in how else 0)
    count = {name: row["arithmetic"]["operations"] for name, row in (("found", found), ("always", always))}
    share = found["guide_forwards"]
    assert count["always"]["grams"] > 0
    assert count["found"]["grams"] == pytest.approx(count["always"]["grams"] * share, rel=1e-3)
    assert found["global_bytes"]["exact"] == always["global_bytes"]["exact"] * share
    if not share:
        assert found["arithmetic"]["products_seconds"] == 0


def test_steps_of_two_kinds_are_not_measured_as_one(tmp_path):
    guidance = GuidanceConfig(guidance_stop_step=3)
    with pytest.raises(ValueError, match=r"steps 1 to 3 of each turn are counted, and they are not .* of two kinds"):
        measure_cost(gpt2(), llama(), texts(), arguments(tmp_path), guidance, Plan(steps=3))
    every = GuidanceConfig(guidance_every=2, prealign_steps=2)
    with pytest.raises(ValueError, match=r"prealign_steps=2, guidance_every=2\)"):
        measure_cost(gpt2(), llama(), texts(), arguments(tmp_path), every, Plan(steps=4))


def test_a_cache_is_full_before_steps_are_counted(tmp_path, resnet):
    cached = {"cache_guide": str(tmp_path / "cache"), "sketch": 4, "sample_id_column": "id", "guidance_every": 2}
    guidance, rows = GuidanceConfig(guide_layers=["Conv2d"], **cached), random_images(16, 32, 4)
    found = measure_cost(fcn(), resnet, rows, arguments(tmp_path), guidance, Plan(rounds=1, steps=7, paper=False))
    assert found["guide_forwards"] == 0  # though steps 5 to 8 are of a second epoch


def test_rows_that_are_no_whole_steps_are_refused(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=3, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match="there are 8 rows, and a step takes 6"):
        measure_cost(gpt2(), llama(), texts(), args, GuidanceConfig(), Plan(rounds=1, steps=1))


def test_a_caches_look_at_the_first_rows_is_no_part_of_a_step(tmp_path, resnet):
    cached = {"cache_guide": str(tmp_path / "cache"), "sketch": 4, "sample_id_column": "id"}
    plan, rows = Plan(rounds=1, steps=1, paper=False, arithmetic=True), random_images(8, 32, 4)
    found = measure_cost(
        fcn(), resnet, rows, arguments(tmp_path), GuidanceConfig(guide_layers=["Conv2d"], **cached), plan
    )
    count = found["arithmetic"]["operations"]
    assert found["guide_forwards"] == 0
    assert found["arithmetic"]["products_seconds"] > 0
    assert count["grams"] == 2 * 4 * 4 * 4 * found["pairs"] + 2 * 2 * 4 * 4 * 4 * 3  # 4 rows, 4 numbers of each


def test_padded_rows_are_compared_by_gram_matrices_whatever_the_width():
    rows = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    assert _padded(rows, GuidanceConfig())
    assert not _padded(rows, GuidanceConfig(sample_axis="token"))
    assert not _padded({"input_ids": rows["input_ids"]}, GuidanceConfig())


@pytest.mark.parametrize(("batch", "thin"), [(20, False), (130, True)])  # small layers are compared all at once
def test_products_of_thin_layers_are_not_those_of_n_by_n_matrices(tmp_path, resnet, batch, thin):
    plan, rows = Plan(rounds=1, steps=1, paper=False, arithmetic=True), random_images(batch, 32, 4)
    args = arguments(tmp_path, per_device_train_batch_size=batch)
    guidance = GuidanceConfig(guide_layers=["Conv2d"], sketch=4)
    found = measure_cost(fcn(), resnet, rows, args, guidance, plan)
    assert (found["arithmetic"]["products_seconds"] is None) == thin
    table = cost_tables([{**found, "name": f"{batch}/32/8", "goal": None, "batch_size": batch}])
    assert table.splitlines()[-1].endswith("| –              | –                 |") == thin


def test_accumulated_products_are_those_of_all_micro_batches_for_each_of_them(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(
        "hf_guidance.experiments.cost.measuring.products_alone", lambda layers, device: found.update(of=layers) or 1
    )
    args = arguments(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    plan = Plan(rounds=1, steps=1, paper=False, arithmetic=True)
    pairs = ["hidden_states.1~hidden_states.1", "hidden_states.2~hidden_states.1"]
    for batch, samples, of_guide in (("accumulated", 8, 1), ("local", 4, 2)):
        guidance = GuidanceConfig(layer_pairs=pairs, similarity_batch=batch)
        measure_cost(gpt2(), llama(), texts(), args, guidance, plan)
        assert {layer.samples for layer in found["of"]} == {samples}
        assert sorted(layer.of_target for layer in found["of"]) == [False] * of_guide + [True] * 4


def test_every_micro_step_runs_the_guide(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    found = measure_cost(gpt2(), llama(), texts(), args, GuidanceConfig(), Plan(rounds=1, steps=2))
    assert found["guide_forwards"] == 2
    args = arguments(tmp_path, per_device_train_batch_size=4)
    once = measure_cost(gpt2(), llama(), texts(), args, GuidanceConfig(), Plan(rounds=1, steps=1, paper=False))
    assert found["global_bytes"]["exact"] == 2 * once["global_bytes"]["exact"]
    assert found["floor"]["median"] == pytest.approx(found["plain"]["median"] + 2 * found["guide"]["median"])
    assert found["guided"]["samples_per_second"] == pytest.approx(8 / found["guided"]["median"])
    assert found["guide"]["samples_per_second"] == pytest.approx(4 / found["guide"]["median"])


def test_a_cached_guides_split_has_no_guide_and_the_papers_floor_still_has():
    seconds = {"plain": 1.0, "guide": 3.0, "guided": 1.5, "paper": 8.0}
    found = {name: {"median": value, "minimum": value} for name, value in seconds.items()}
    found["plain"]["forward"] = {"median": 0.25, "minimum": 0.25}
    found["guided"]["forward"] = {"median": 0.5, "minimum": 0.5}
    result = summary({**found, "guide_forwards": 0.0, "batches_of_a_step": 1})
    assert result["split"] == {"guide_forward": 0.0, "grams_and_measures": 0.25, "extra_backward": 0.25}
    assert (result["overhead"]["median"], result["paper_overhead"]["median"]) == (1.5, 2.0)
    assert result["paper_over_plain"]["minimum"] == 8.0
    twice = summary({**found, "guide_forwards": 2.0, "batches_of_a_step": 2})
    assert (twice["overhead"]["median"], twice["paper_overhead"]["median"]) == (1.5 / 7, 8 / 7)


def test_overhead_of_rounds_is_of_what_ran_beside_each_other():
    seconds = {"plain": [1.0, 1.0, 2.0, 4.0], "guide": [2.0, 2.0, 5.0, 5.0], "guided": [3.0, 3.6, 8.0, 9.6]}
    found = {name: {"all": values} for name, values in seconds.items()} | {"guide_forwards": 1.0}
    of_rounds = overhead_of_rounds(found, rounds=2)
    assert of_rounds["all"] == [pytest.approx(1.1), pytest.approx(1.1)]
    assert (of_rounds["mean"], of_rounds["standard_error"]) == (pytest.approx(1.1), pytest.approx(0, abs=1e-9))
    every = overhead_of_rounds({**found, "guide_forwards": 0.0}, rounds=4)
    assert every["all"] == pytest.approx([3, 3.6, 4, 2.4])
    assert every["standard_error"] == pytest.approx((0.25**2 + 0.35**2 + 0.75**2 + 0.85**2) ** 0.5 / 12**0.5)
    assert overhead_of_rounds(found, rounds=1)["standard_error"] is None


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


# -------------------------------------------------------------------------------------------------------- the settings


def test_rows_are_read_and_a_wrong_one_is_named():
    assert parse_rows(["64/112/1024"]) == [Setting(64, 112, 1024)]
    assert Setting(64, 112, 1024).name == "64/112/1024"
    for wrong in ("64/112", "64/112/wide", "0/32/8"):
        with pytest.raises(ValueError, match=f"--rows {wrong}: expected batch/image/width, such as 64/64/512"):
            parse_rows([wrong])


@pytest.mark.parametrize("name", ["rounds", "steps", "discard"])
def test_a_plan_without_measurements_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        Plan(**{name: 0})


def test_a_guide_of_another_image_size_gets_images_of_its_own(tmp_path, resnet):
    networks = Networks("deep_fcn", "timm/resnet10t", depth=2, guide_image_size=48)
    target, rows = networks.build(Setting(3, 32, 8), resnet, batches=2, seed=0)
    assert len(rows) == 6
    assert rows[0]["pixel_values"].shape == (3, 32, 32)
    assert rows[0]["guide_pixel_values"].shape == (3, 48, 48)
    assert (target.config.hidden_size, target.config.num_hidden_layers) == (8, 2)
    plan = Plan(rounds=1, steps=1)
    found = measure_cost(target, resnet, rows, arguments(tmp_path, per_device_train_batch_size=3), CONVS, plan)
    assert found["guide_forwards"] == 1


def test_ids_of_samples_reach_the_guided_trainer_alone():
    rows = random_images(4, 8, 2)
    assert "id" not in rows[1]
    assert rows.with_ids("id")[1]["id"] == 1


def test_the_target_is_not_trained_itself(tmp_path):
    target = gpt2()
    before = copy.deepcopy(target.state_dict())
    measure_cost(target, llama(), texts(), arguments(tmp_path), GuidanceConfig(), Plan(rounds=1, steps=1, paper=False))
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_the_plain_variant_is_a_trainer_and_no_guidance_trainer(tmp_path):
    from hf_guidance.experiments.cost.variants import make_trainers

    made = make_trainers(gpt2(), llama(), texts(), arguments(tmp_path), GuidanceConfig())
    assert {name: type(trainer) for name, trainer in made.items()} == {
        "plain": Trainer,
        "guided": GuidanceTrainer,
        "paper": PaperTrainer,
    }
    first, second = (trainer.model for name, trainer in made.items() if name != "paper")
    assert first is not second
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
