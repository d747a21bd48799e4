"""A step whose loss, similarity or gradient is not finite is never taken: the run stops, or leaves it out."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from builders import (
    LENGTH,
    NormNet,
    PlainNet,
    arguments,
    gpt2,
    gradients,
    guidance_by_hand,
    linear,
    llama,
    llama_config,
    seeded,
    token_batch,
    token_rows,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trainers import make_trainer, same, trained, weights
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainerState

from hf_guidance import GuidanceTrainer
from hf_guidance.trainer.not_finite import GRADIENT
from hf_guidance.trainer.steps import FiniteSteps, RunningMeans

NAN = float("nan")
ACCELERATOR = Accelerator(cpu=True)


def spoil(module: nn.Module, forward: int, value: float = NAN) -> None:
    """Multiply the output of the module's n-th forward, counted from 0, by a value."""
    count = iter(range(10**6))

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if next(count) != forward:
            return None
        return output * value if torch.is_tensor(output) else (output[0] * value, *output[1:])

    module.register_forward_hook(hook)


class Watch(TrainerCallback):
    """Weights and optimizer state before the first step and after each."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.moments: list[list[Tensor]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.on_step_end(*args, **kwargs)

    def on_step_end(self, *args: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        self.weights.append(weights(model))
        states = optimizer.state.values()
        self.moments.append([value.clone() for state in states for value in state.values()])


def spoil_similarity(target: nn.Module, guide: nn.Module) -> None:
    spoil(guide.layers[1], 1)


def spoil_task(target: nn.Module, guide: nn.Module) -> None:
    spoil(target.lm_head, 1, math.inf)


def spoil_gradient(target: nn.Module, guide: nn.Module) -> None:
    count = iter(range(100))
    target.lm_head.weight.register_hook(lambda gradient: gradient * (NAN if next(count) == 1 else 1))


SPOILED: dict[str, tuple[Callable[[nn.Module, nn.Module], None], str]] = {
    "a similarity": (spoil_similarity, r"the linear_cka of hidden_states\.2~hidden_states\.2 is nan"),
    "the task loss": (spoil_task, "the task loss is (nan|inf)"),
    "a gradient": (spoil_gradient, "the norm of the gradient is nan"),
}


def spoiled(folder: Path, kind: str, **settings: Any) -> tuple[GuidanceTrainer, Watch]:
    """A run whose second forward is not finite."""
    target, guide, watch = gpt2(), llama(), Watch()
    SPOILED[kind][0](target, guide)
    layers = {"layer_pairs": ["hidden_states.1~hidden_states.1", "hidden_states.2~hidden_states.2"]}
    options = {"callbacks": [watch], "weight_decay": 0.1, "looks": False, **layers, **settings}
    return make_trainer(folder, target, guide, **options), watch


@pytest.mark.parametrize("kind", SPOILED)
def test_the_run_stops_before_the_step_and_names_what_is_not_finite(tmp_path: Path, kind: str) -> None:
    trainer, watch = spoiled(tmp_path, kind, save_strategy="steps", save_steps=1)
    with pytest.raises(FloatingPointError, match=rf"Optimizer step 2 is not finite: {SPOILED[kind][1]}.*was not taken"):
        trainer.train()
    assert len(watch.weights) == 2
    assert same(weights(trainer.model), watch.weights[1])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("guide", [llama, lambda: None], ids=["a guide", "settings alone"])
def test_a_run_without_guidance_stops_too(tmp_path: Path, guide: Callable[[], nn.Module | None]) -> None:
    target, args, config = gpt2(), arguments(tmp_path), linear(guidance_weight=0)
    spoil(target.lm_head, 1)
    trainer = GuidanceTrainer(target, args, train_dataset=token_rows(), guide=guide(), guidance=config)
    with pytest.raises(FloatingPointError, match=r"Optimizer step 2 is not finite: the task loss is nan\. It was not"):
        trainer.train()


@pytest.mark.parametrize("filters", [True, False])
def test_without_guide_and_settings_a_loss_that_is_not_finite_is_plain_trainers_business(
    tmp_path: Path, filters: bool
) -> None:
    shape = {"logging_nan_inf_filter": filters, "logging_steps": 3, "optim": "sgd", "learning_rate": 0.0}
    runs = []
    for kind in (Trainer, GuidanceTrainer):
        target = gpt2()
        spoil(target.lm_head, 1)
        trainer = kind(model=target, args=arguments(tmp_path, **shape), train_dataset=token_rows())
        runs.append(trained(trainer))
    (weights_there, (there,)), (weights_here, (here,)) = runs
    torch.testing.assert_close(weights_here, weights_there, rtol=0, atol=0, equal_nan=True)
    assert not all(value.isfinite().all() for value in weights_here.values()), "the step was taken"
    assert math.isfinite(here["loss"]) == filters
    torch.testing.assert_close(here, there, rtol=0, atol=0, equal_nan=True)


def test_a_step_without_guidance_is_skipped_and_counted_too(tmp_path: Path) -> None:
    target = gpt2()
    spoil(target.lm_head, 1)
    config = linear(guidance_weight=0, on_non_finite="skip")
    trainer = GuidanceTrainer(target, arguments(tmp_path), train_dataset=token_rows(), guidance=config)
    assert [log.get("guidance/skipped_steps") for log in trained(trainer)[1]] == [None, 1, None]
    assert all(value.isfinite().all() for value in weights(target).values())


@pytest.mark.parametrize("kind", SPOILED)
def test_a_step_that_is_skipped_leaves_weights_and_moments_alone_and_is_counted(tmp_path: Path, kind: str) -> None:
    trainer, watch = spoiled(tmp_path, kind, on_non_finite="skip")
    logs = trained(trainer)[1]
    assert same(watch.weights[1], watch.weights[2])
    assert all(map(torch.equal, watch.moments[1], watch.moments[2]))
    assert not same(watch.weights[0], watch.weights[1])
    assert not same(watch.weights[2], watch.weights[3])
    assert [log.get("guidance/skipped_steps") for log in logs] == [None, 1, None]
    assert [("guidance/loss" in log, "task/loss" in log) for log in logs] == [
        (True, True),
        (False, False),
        (True, True),
    ]
    own = [value for log in logs for name, value in log.items() if name != "grad_norm"]
    assert all(math.isfinite(value) for value in own)


def test_skipped_steps_are_summed_and_the_means_are_of_the_others(tmp_path: Path) -> None:
    still = {"optim": "sgd", "learning_rate": 0.0}
    (log,) = trained(spoiled(tmp_path, "a similarity", on_non_finite="skip", logging_steps=3, **still)[0])[1]
    others = trained(make_trainer(tmp_path, gpt2(), llama(), layer_pairs=[
        "hidden_states.1~hidden_states.1", "hidden_states.2~hidden_states.2"], **still))[1]  # fmt: skip
    assert log["guidance/skipped_steps"] == 1
    assert log["guidance/loss"] == pytest.approx((others[0]["guidance/loss"] + others[2]["guidance/loss"]) / 2)


def test_with_accumulation_the_micro_step_is_named_and_there_is_one_reduction_per_optimizer_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = spoiled(tmp_path, "a similarity", on_non_finite="skip", gradient_accumulation_steps=3)
    calls, reduce = [], trainer.accelerator.reduce
    monkeypatch.setattr(
        trainer.accelerator, "reduce", lambda *args, **kwargs: calls.append(1) or reduce(*args, **kwargs)
    )
    trainer.train()
    assert len(calls) == 3
    trainer, _ = spoiled(tmp_path, "a similarity", gradient_accumulation_steps=3)
    with pytest.raises(FloatingPointError, match=r"step 1 is not finite: .*hidden_states\.2 is nan \(micro-step 1\)"):
        trainer.train()


def test_a_skipped_step_is_as_if_it_had_not_been_there_with_accumulation_too(tmp_path: Path) -> None:
    shape = {"gradient_accumulation_steps": 2, "on_non_finite": "skip"}
    trainer, watch = spoiled(tmp_path, "a similarity", **shape)
    trainer.train()
    assert same(watch.weights[0], watch.weights[1])
    assert not same(watch.weights[1], watch.weights[2])


def test_a_step_that_is_skipped_leaves_running_statistics_alone(tmp_path: Path) -> None:
    class Normed(PlainNet):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(LENGTH)

        def forward(self, input_ids: Tensor, labels: Any = None) -> Any:
            hidden = self.norm(self.body[:2](input_ids))
            logits = self.body[2:](hidden)
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    target, guide = Normed(), llama()
    spoil(target.body[1], 1)
    trained(make_trainer(tmp_path, target, guide, on_non_finite="skip", target_layers=["norm"], guide_layers=["norm"]))
    assert target.norm.running_mean.isfinite().all()
    assert target.norm.running_mean.abs().max() > 0, "those of the other steps are there"


def test_the_gradient_norm_of_a_sharded_target_is_looked_at(tmp_path: Path) -> None:
    looked = FiniteSteps(accelerator := Accelerator(cpu=True), RunningMeans(), skip=False)
    looked.on_train_begin()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        norm = DTensor.from_local(torch.tensor([NAN]), mesh)[0]
        looked.expect_finite({GRADIENT: norm, "task loss": torch.tensor(1.0)}, "")
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(FloatingPointError, match="Optimizer step 1 is not finite: the norm of the gradient is nan"):
        looked.on_pre_optimizer_step(None, TrainerState())
    assert accelerator.num_processes == 1


def test_nothing_is_kept_where_nobody_looks(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gpt2())
    trained(trainer)
    assert trainer._finite._seen == []
    trainer.compute_loss(trainer.model.train(), token_batch())
    assert trainer._finite._seen == []


def test_a_logged_measure_alone_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, gpt2(), llama(), log_measures=["debiased_cka"])
    watch_losses, add = [], trainer._add_guidance

    def with_nan(task_loss: Tensor, watched: Any, num_items: Any) -> Tensor:
        watched.similarities["debiased_cka"] = dict.fromkeys(watched.similarities["debiased_cka"], torch.tensor(NAN))
        watch_losses.append(task_loss)
        return add(task_loss, watched, num_items)

    monkeypatch.setattr(trainer, "_add_guidance", with_nan)
    logs = trained(trainer)[1]
    assert len(watch_losses) == 3
    assert math.isnan(logs[0]["guidance/debiased_cka/hidden_states.1~hidden_states.1"])


def test_what_a_guide_of_nan_weights_says(tmp_path: Path) -> None:
    guide = NormNet()
    with torch.no_grad():
        guide.out.weight[0, 0] = NAN
    trainer = make_trainer(tmp_path, gpt2(), guide, guide_layers=["embed", "out"])
    with pytest.raises(
        FloatingPointError,
        match=r"finite: the guide layer out is nan; the linear_cka of hidden_states\.2~out is nan\. It was",
    ):
        trainer.train()


# ------------------------------------------------------------------------------------------------------ loss scaling


def scaled(folder: Path, scale: float, **settings: Any) -> GuidanceTrainer:
    """A run in float16 under a gradient scaler, which accelerate itself sets up on GPUs only."""
    trainer = make_trainer(folder, gpt2(), llama(), looks=False, **settings)
    trainer.accelerator.native_amp, trainer.accelerator.state._mixed_precision = True, "fp16"
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    return trainer


def test_gradients_of_both_terms_are_scaled_and_unscaled(tmp_path: Path) -> None:
    sgd = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1}
    trainer = scaled(tmp_path, 2.0**10, **sgd)
    copy, guide, batches = gpt2(), llama(), []
    trainer.model.register_forward_pre_hook(lambda m, args, kwargs: batches.append(dict(kwargs)), with_kwargs=True)
    trainer.train()
    batch = {name: batches[0][name] for name in ("input_ids", "labels")}
    slopes = gradients(copy, copy(**batch).loss + guidance_by_hand(copy, guide, batch))
    with torch.no_grad():
        for parameter, slope in zip(copy.parameters(), slopes, strict=True):
            parameter -= 0.1 * slope
    torch.testing.assert_close(weights(trainer.model), weights(copy), rtol=0, atol=2e-4)


def test_an_overflow_of_the_scaled_gradient_is_left_to_the_scaler(tmp_path: Path) -> None:
    watch = Watch()
    trainer = scaled(tmp_path, 2.0**128 * 0.99, callbacks=[watch], max_steps=4)
    logs = trained(trainer)[1]
    assert same(watch.weights[0], watch.weights[1]), "the scaler left the step out"
    assert trainer.accelerator.scaler.get_scale() < 2.0**127
    assert all("guidance/skipped_steps" not in log and math.isfinite(log["guidance/loss"]) for log in logs)


def test_a_gradient_that_no_scale_mends_is_not_left_to_the_scaler(tmp_path: Path) -> None:
    trainer = scaled(tmp_path, 2.0**2, max_steps=8)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * NAN)
    with pytest.raises(FloatingPointError, match="step 3 is not finite: the norm of the gradient is nan"):  # 4, 2, 1
        trainer.train()


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_similarity_that_is_not_finite_is_not_the_scalers_business(tmp_path: Path, action: str) -> None:
    trainer = scaled(tmp_path, 2.0**10, on_non_finite=action)
    spoil(trainer.guide.layers[1], 1)
    if action == "stop":
        with pytest.raises(FloatingPointError, match="step 2 is not finite: the linear_cka of"):
            trainer.train()
    else:
        assert [log.get("guidance/skipped_steps") for log in trained(trainer)[1]] == [None, 1, None]


# ---------------------------------------------------------------------------------------------------- large features


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1e4), (torch.float16, 1e4), (torch.float16, 6e4)])
def test_large_activations_of_low_precision_give_the_same_similarity_and_a_finite_gradient(
    dtype: torch.dtype, size: float
) -> None:
    from hf_guidance import GuidanceLoss

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Embedding(17, 8).to(dtype)
            with torch.no_grad():
                self.body.weight.copy_(size * torch.rand(17, 8, generator=torch.Generator().manual_seed(0)) * 2 - size)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.body(input_ids)

    target, guide, batch = Scaled(), llama(), {"input_ids": token_batch()["input_ids"]}
    loss = GuidanceLoss(target, guide, linear(target_layers=["body"], guide_layers=["hidden_states.1"]))
    with loss.watch(batch) as watched:
        target(**batch)
    (similarity,) = watched.similarities["linear_cka"].values()
    from builders import cka, hidden_states

    with torch.no_grad():
        expected = cka(target(**batch), hidden_states(guide, batch)[0])
    assert similarity.dtype == torch.float32
    assert similarity.item() == pytest.approx(expected.item(), abs=2e-2)
    watched.loss.backward()
    assert target.body.weight.grad.isfinite().all()


# ----------------------------------------------------------------------- optimizers that step inside the backward pass


class StepsNothing(torch.optim.SGD):
    """Stands in for transformers' LayerWiseDummyOptimizer, whose weights have optimizers of their own."""

    def step(self, closure: Any = None) -> None:
        return None


def step_by_hooks(network: nn.Module) -> torch.optim.Optimizer:
    """Take the step of each weight once its gradient is complete, as layerwise GaLore does."""

    def step(weight: Tensor) -> None:
        with torch.no_grad():
            weight -= 0.01 * weight.grad
        weight.grad = None

    for weight in network.parameters():
        weight.register_post_accumulate_grad_hook(step)
    return StepsNothing(network.parameters(), lr=0.01)


class LikeLomo(GuidanceTrainer):
    """Stands in for LOMO: accelerate calls the optimizer's own backward, which takes the step weight by weight."""

    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = step_by_hooks(self.model)
        self.accelerator.has_lomo_optimizer = True
        self.accelerator.lomo_backward = lambda loss, learning_rate: loss.backward()
        return self.optimizer


def backward_run(
    folder: Path, kind: str, way: str, guided: bool = True, **settings: Any
) -> tuple[GuidanceTrainer, list[dict[str, Tensor]]]:
    """A run whose second forward is not finite, with steps inside the backward pass; and its weights after steps."""
    target, guide, watch = gpt2(), llama(), Watch()
    if kind:
        SPOILED[kind][0](target, guide)
    guidance = linear(on_non_finite=settings.pop("on_non_finite", "stop"), guidance_weight=float(guided))
    own: dict[str, Any] = {"guide": guide if guided else None, "guidance": guidance}
    if way == "lomo":
        args = arguments(folder, optim="lomo", max_grad_norm=0.0, **settings)
        trainer: GuidanceTrainer = LikeLomo(target, args, train_dataset=token_rows(), callbacks=[watch], **own)
    else:
        args = arguments(folder, max_grad_norm=0.0, **settings)
        optimizer = step_by_hooks(target)
        both = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
        trainer = GuidanceTrainer(target, args, train_dataset=token_rows(), callbacks=[watch], optimizers=both, **own)
    trainer.takes_first_look = False
    return trainer, watch.weights


@pytest.mark.parametrize(
    ("kind", "guided"), [("a similarity", True), ("the task loss", True), ("the task loss", False)]
)
@pytest.mark.parametrize("way", ["lomo", "hooks"])
def test_no_step_inside_the_backward_pass_is_taken_from_a_loss_that_is_not_finite(
    way: str, kind: str, guided: bool, tmp_path: Path
) -> None:
    trainer, after = backward_run(tmp_path, kind, way, guided)
    words = {"a similarity": r"the linear_cka of .* is nan", "the task loss": r"the task loss is (nan|inf)"}[kind]
    done = (
        r"Its backward pass, in which the optimizer takes the step, was not run\. Lower the learning rate, or check the"
    )
    with pytest.raises(FloatingPointError, match=rf"^Optimizer step 2 is not finite: {words}.*{done} data\.$"):
        trainer.train()
    assert len(after) == 2
    assert not same(after[0], after[1]), "the first step was taken in its backward pass"
    assert same(weights(trainer.model), after[1])


@pytest.mark.parametrize("way", ["lomo", "hooks"])
def test_a_step_inside_the_backward_pass_is_a_warning_and_trains(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, after = backward_run(tmp_path, "", way)
    trainer.train()
    assert len(after) == 4
    assert not any(same(one, other) for one, other in pairwise(after))
    said = {
        "lomo": "The optimizer lomo takes its steps inside the backward pass",
        "hooks": "weights have hooks that run",
    }
    assert said[way] in caplog.text
    assert "a gradient that is not finite is not noticed" in caplog.text


def test_steps_inside_the_backward_pass_cannot_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"on_non_finite='skip' cannot leave a step out here: the optimizer lomo takes"
    ):
        backward_run(tmp_path, "", "lomo", on_non_finite="skip")
    trainer, after = backward_run(tmp_path, "", "hooks", on_non_finite="skip")
    with pytest.raises(
        ValueError, match=r"cannot leave a step out here: \d+ weights have hooks .*Use on_non_finite='stop'"
    ):
        trainer.train()
    assert len(after) <= 1


def test_other_optimizers_are_looked_at_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    look = FiniteSteps._any_not_finite
    monkeypatch.setattr(FiniteSteps, "_any_not_finite", lambda self: looks.append(1) or look(self))
    make_trainer(tmp_path, gpt2(), llama(), gradient_accumulation_steps=2, looks=False).train()
    assert len(looks) == 3


@pytest.mark.trainers
@pytest.mark.parametrize(
    ("package", "settings"),
    [
        ("lomo_optim", {"optim": "lomo"}),
        ("galore_torch", {"optim": "galore_adamw_layerwise", "optim_target_modules": ["self_attn", "mlp"]}),
    ],
)
def test_the_real_optimizers_that_step_backward_train_and_take_no_step_from_what_is_not_finite(
    package: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip(package)

    def target() -> nn.Module:
        return seeded(lambda: LlamaForCausalLM(llama_config(2)), 0)

    settings |= {"max_grad_norm": 0.0, "learning_rate": 1e-2, "max_steps": 3, "looks": False}
    good, before = target(), weights(target())
    make_trainer(tmp_path / "good", good, llama(), **settings).train()
    assert not same(weights(good), before)
    bad, guide = target(), llama()
    SPOILED["a similarity"][0](bad, guide)
    trainer = make_trainer(tmp_path / "bad", bad, guide, **settings)
    with pytest.raises(FloatingPointError, match=r"^Optimizer step 2 is not finite: the linear_cka of .* is nan"):
        trainer.train()
    assert all(bool(value.isfinite().all()) for value in weights(bad).values())
    assert not same(weights(bad), before), "the first step was taken"
    with pytest.raises(ValueError, match=r"on_non_finite='skip' cannot leave a step out here: the optimizer"):
        make_trainer(tmp_path / "skip", target(), llama(), on_non_finite="skip", **settings).train()


def test_a_guide_that_is_not_finite_itself_is_named_instead_of_the_learning_rate(tmp_path: Path) -> None:
    guide = llama()
    with torch.no_grad():
        guide.layers[1].mlp.down_proj.weight[0, 0] = NAN
    trainer = make_trainer(tmp_path, gpt2(), guide)
    words = (
        r"step 1 is not finite: the guide layer hidden_states\.2 is nan.*It is the frozen guide .*float32 or bfloat16"
    )
    with pytest.raises(FloatingPointError, match=words) as raised:
        trainer.train()
    assert "Lower the learning rate" not in str(raised.value)


def test_values_are_averaged_by_their_weights_and_counts_are_summed() -> None:
    sums = RunningMeans()
    for value, weight in ((1.0, 1.0), (torch.tensor(4.0), 1.0)):
        sums.add("mean", value, weight)
    sums.add("half", 2.0, 0.5)
    for _ in range(3):
        sums.add("count", 1.0, 0)
    assert sums.drain(ACCELERATOR) == pytest.approx({"mean": 2.5, "half": 4.0, "count": 3.0})
    assert sums.drain(ACCELERATOR) == {}


def test_those_of_a_step_that_is_taken_are_added_to_those_before() -> None:
    before, step = RunningMeans(), RunningMeans()
    before.add("a", 1.0)
    step.add("a", 3.0)
    step.add("b", 5.0)
    before.take(step)
    assert before.drain(ACCELERATOR) == {"a": 2.0, "b": 5.0}
