"""The cost of guidance adds up, and is that of the real steps."""

import copy
from contextlib import nullcontext

import pytest
import torch
from builders import arguments, gpt2, linear, llama, module_outputs
from costs import CONVS, fcn, texts
from torch import nn

from hf_guidance.experiments.cost.communication import Compared, compared_features
from hf_guidance.experiments.cost.measuring import Plan, measure_cost
from hf_guidance.experiments.cost.random_rows import random_images
from hf_guidance.experiments.cost.table import cost_tables


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


def test_what_was_measured_is_kept_though_the_arithmetic_fails(tmp_path, monkeypatch, caplog):
    def fails(*args):
        raise TypeError("no such operation")

    monkeypatch.setattr("hf_guidance.experiments.cost.measuring.matmul_rate", fails)
    plan = Plan(rounds=1, steps=1, paper=False, arithmetic=True)
    found = measure_cost(gpt2(), llama(), texts(), arguments(tmp_path), linear(), plan)
    assert found["overhead"]["median"] > 0
    assert "arithmetic" not in found
    assert "what was measured is kept" in caplog.text


def test_a_guide_that_no_step_runs_leaves_the_plain_step_as_the_floor(tmp_path):
    plan = Plan(rounds=1, steps=1, paper=False)
    found = measure_cost(gpt2(), llama(), texts(), arguments(tmp_path), linear(guidance_weight=0.0), plan)
    assert found["guide_forwards"] == 0
    assert found["overhead"] == found["guided_over_plain"]
    assert found["split"]["guide_forward"] == found["global_bytes"]["exact"] == 0
    assert "paper" not in found


@pytest.mark.parametrize("how", [{"guidance_every": 2}, {"guidance_stop_step": 1}], ids=lambda how: next(iter(how)))
def test_only_counted_steps_count_the_guides_forwards(how, tmp_path):
    plan = Plan(rounds=1, steps=1, paper=False, arithmetic=True)  # the discarded step is guided
    found = measure_cost(gpt2(), llama(), texts(), arguments(tmp_path), linear(**how), plan)
    always = measure_cost(gpt2(), llama(), texts(), arguments(tmp_path), linear(), plan)
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
    guidance = linear(guidance_stop_step=3)
    with pytest.raises(ValueError, match=r"steps 1 to 3 of each turn are counted, and they are not .* of two kinds"):
        measure_cost(gpt2(), llama(), texts(), arguments(tmp_path), guidance, Plan(steps=3))
    every = linear(guidance_every=2, prealign_steps=2)
    with pytest.raises(ValueError, match=r"prealign_steps=2, guidance_every=2\)"):
        measure_cost(gpt2(), llama(), texts(), arguments(tmp_path), every, Plan(steps=4))


def test_a_warm_up_longer_than_what_is_measured_costs_as_much_and_a_stop_at_an_unknown_step_is_refused(tmp_path):
    plan, args = Plan(rounds=1, steps=1, paper=False), arguments(tmp_path)
    guidance = linear(guidance_warmup_steps=1000, measure="linear_cka")
    assert measure_cost(gpt2(), llama(), texts(), args, guidance, plan)["guide_forwards"] == 1
    guidance = linear(guidance_stop_similarity=0.9)
    with pytest.raises(ValueError, match="guidance_stop_similarity may end guidance while steps are counted"):
        measure_cost(gpt2(), llama(), texts(), args, guidance, plan)


def test_a_cache_is_full_before_steps_are_counted(tmp_path, resnet):
    cached = {"cache_guide": str(tmp_path / "cache"), "sketch": 4, "sample_id_column": "id", "guidance_every": 2}
    guidance, rows = linear(guide_layers=["Conv2d"], **cached), random_images(16, 32, 4)
    found = measure_cost(fcn(), resnet, rows, arguments(tmp_path), guidance, Plan(rounds=1, steps=7, paper=False))
    assert found["guide_forwards"] == 0  # though steps 5 to 8 are of a second epoch


def test_rows_that_are_no_whole_steps_are_refused(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=3, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match="there are 8 rows, and a step takes 6"):
        measure_cost(gpt2(), llama(), texts(), args, linear(), Plan(rounds=1, steps=1))


def test_a_caches_look_at_the_first_rows_is_no_part_of_a_step(tmp_path, resnet):
    cached = {"cache_guide": str(tmp_path / "cache"), "sketch": 4, "sample_id_column": "id"}
    plan, rows = Plan(rounds=1, steps=1, paper=False, arithmetic=True), random_images(8, 32, 4)
    found = measure_cost(fcn(), resnet, rows, arguments(tmp_path), linear(guide_layers=["Conv2d"], **cached), plan)
    count = found["arithmetic"]["operations"]
    assert found["guide_forwards"] == 0
    assert found["arithmetic"]["products_seconds"] > 0
    assert count["grams"] == 2 * 4 * 4 * 4 * found["pairs"] + 2 * 2 * 4 * 4 * 4 * 3  # 4 rows, 4 numbers of each


@pytest.mark.parametrize(("batch", "primal"), [(8, False), (20, True)])  # of 4 numbers each
def test_layers_that_stay_features_have_no_products_of_n_by_n_matrices(tmp_path, resnet, batch, primal):
    plan, rows = Plan(rounds=1, steps=1, paper=False, arithmetic=True), random_images(batch, 32, 4)
    args = arguments(tmp_path, per_device_train_batch_size=batch)
    guidance = linear(guide_layers=["Conv2d"], sketch=4)
    found = measure_cost(fcn(), resnet, rows, args, guidance, plan)
    assert (found["arithmetic"]["products_seconds"] is None) == primal
    table = cost_tables([{**found, "name": f"{batch}/32/8", "goal": None, "batch_size": batch}])
    assert table.splitlines()[-1].endswith("| –              | –                 |") == primal


def test_accumulated_products_are_those_of_all_micro_batches_for_each_of_them(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(
        "hf_guidance.experiments.cost.measuring.products_alone", lambda layers, device: found.update(of=layers) or 1
    )
    args = arguments(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    plan = Plan(rounds=1, steps=1, paper=False, arithmetic=True)
    pairs = ["hidden_states.1~hidden_states.1", "hidden_states.2~hidden_states.1"]
    for batch, samples, of_guide in (("accumulated", 8, 1), ("local", 4, 2)):
        guidance = linear(layer_pairs=pairs, similarity_batch=batch)
        measure_cost(gpt2(), llama(), texts(), args, guidance, plan)
        assert {layer.samples for layer in found["of"]} == {samples}
        assert sorted(layer.of_target for layer in found["of"]) == [False] * of_guide + [True] * 4


def test_every_micro_step_runs_the_guide(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    found = measure_cost(gpt2(), llama(), texts(), args, linear(), Plan(rounds=1, steps=2))
    assert found["guide_forwards"] == 2
    args = arguments(tmp_path, per_device_train_batch_size=4)
    once = measure_cost(gpt2(), llama(), texts(), args, linear(), Plan(rounds=1, steps=1, paper=False))
    assert found["global_bytes"]["exact"] == 2 * once["global_bytes"]["exact"]
    assert found["floor"]["median"] == pytest.approx(found["plain"]["median"] + 2 * found["guide"]["median"])
    assert found["guided"]["samples_per_second"] == pytest.approx(8 / found["guided"]["median"])
    assert found["guide"]["samples_per_second"] == pytest.approx(4 / found["guide"]["median"])


@pytest.mark.parametrize("name", ["rounds", "steps", "discard"])
def test_a_plan_without_measurements_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        Plan(**{name: 0})


def test_the_target_is_not_trained_itself(tmp_path):
    target = gpt2()
    before = copy.deepcopy(target.state_dict())
    measure_cost(target, llama(), texts(), arguments(tmp_path), linear(), Plan(rounds=1, steps=1, paper=False))
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
