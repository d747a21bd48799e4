"""The look at the start of training: what it says, that it changes nothing, and a case for each warning."""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import LENGTH, VOCABULARY, NormNet, PlainNet, gpt2, gradients, llama, seeded, token_rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from trainers import make_trainer, same, train_logs, trained, weights
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import logging as of_transformers

from hf_guidance import GuidanceLoss, GuidanceTrainer
from hf_guidance.trainer import first_look
from hf_guidance.trainer.first_look import show, unchanged

TITLE = "Guidance on the first batch"
PLAIN = {"target_layers": ["body.1", "body.4"]}


class Normed(nn.Module):
    """A target with dropout, and batch norm under activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = seeded(lambda: nn.Embedding(VOCABULARY, 8), 0)
        self.norm, self.drop = nn.BatchNorm1d(LENGTH), nn.Dropout(0.2)
        self.out = seeded(lambda: nn.Linear(8, VOCABULARY), 1)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        normed = checkpoint(self.norm, self.embed(input_ids), use_reentrant=False)
        logits = self.out(self.drop(normed.tanh()))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class Random(nn.Module):
    """A guide that masks at random in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.masked = seeded(lambda: nn.Embedding(VOCABULARY, 8), 3), nn.Identity()

    def forward(self, input_ids: Tensor) -> Tensor:
        kept = torch.rand(input_ids.shape) > 0.5
        return self.masked(self.embed(input_ids) * kept[..., None])


class Fixed(nn.Module):
    """A guide of one layer that returns what it is made from, whatever the input."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.features = features

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layer(self.features)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return the warnings of the look."""
    caplog.set_level(logging.WARNING)
    return lambda: [r.getMessage() for r in caplog.records if r.name == first_look.__name__]


# -------------------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_run_prints_one_look_before_its_first_step_and_keeps_it(
    tmp_path: Path, disable_tqdm: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []

    class BeforeStep(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            printed.append(capsys.readouterr().out)

    trainer = make_trainer(tmp_path, gpt2(), llama(), disable_tqdm=disable_tqdm, callbacks=[BeforeStep()])
    logs = trained(trainer)[1]
    assert [text.count(TITLE) for text in (*printed, capsys.readouterr().out)] == [1, 0, 0, 0]
    look = trainer.first_look
    assert look is not None
    assert (look.measure, look.sample_axis, look.weight, look.reduction) == ("linear_cka", "sequence", 1.0, "sum")
    for pair in look.pairs:
        name = f"{pair.target}~{pair.guide}"
        assert pair.similarity == pytest.approx(logs[0][f"guidance/similarity/{name}"], abs=1e-6)
        assert pair.debiased_cka == pytest.approx(logs[0][f"guidance/debiased_cka/{name}"], abs=1e-6)
    assert {name: (layer.samples, layer.features) for name, layer in look.targets.items()} == {
        "hidden_states.1": (4, LENGTH * 8),
        "hidden_states.2": (4, LENGTH * 8),
    }
    assert list(look.guides) == ["hidden_states.1", "hidden_states.2", "hidden_states.3"]


@pytest.mark.parametrize(
    "settings", [{"guidance_weight": 0.0}, {"looks": False}, {"per_device_train_batch_size": 4, "resumed": True}]
)
def test_there_is_no_look_without_guidance_nor_on_resume_nor_where_it_is_off(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    resumed = settings.pop("resumed", False)
    saving = {"save_strategy": "steps", "save_steps": 1}
    if resumed:
        make_trainer(tmp_path, gpt2(), llama(), max_steps=2, **saving).train()
        capsys.readouterr()
    trainer = make_trainer(tmp_path, gpt2(), llama(), **settings, **saving)
    trainer.train(resume_from_checkpoint=resumed)
    assert trainer.first_look is None
    assert TITLE not in capsys.readouterr().out


def test_every_training_from_the_start_is_looked_at_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path, None, llama(), model_init=lambda: gpt2())
    trainer.train()
    first, trainer.first_look = trainer.first_look, None
    trainer.train()
    assert trainer.first_look == first
    assert capsys.readouterr().out.count(TITLE) == 2


def test_the_look_waits_for_the_first_batch_that_is_guided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*token_rows(2), *token_rows(4)]
    loader = torch.utils.data.DataLoader(rows, batch_sampler=[[0, 1], [2, 3, 4, 5]])

    class Two(GuidanceTrainer):
        def get_train_dataloader(self) -> Any:
            return loader

    made = make_trainer(tmp_path, gpt2(), llama(), max_steps=2)
    trainer = Two(gpt2(), made.args, train_dataset=rows, guide=llama(), guidance=made.guidance)
    trainer.train()
    assert [("guidance/loss" in log) for log in train_logs(trainer)] == [False, True]
    assert trainer.first_look is not None
    assert trainer.first_look.targets.keys() == {"hidden_states.1", "hidden_states.2"}
    assert capsys.readouterr().out.count(TITLE) == 1


def test_nothing_is_printed_to_those_who_want_quiet_and_by_other_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    trainer = make_trainer(tmp_path, gpt2(), llama(), guidance_weight=1e6)
    before = of_transformers.get_verbosity()
    of_transformers.set_verbosity_error()
    try:
        trainer.train()
    finally:
        of_transformers.set_verbosity(before)
    assert TITLE not in capsys.readouterr().out
    assert len(said()) == 1
    look = trainer.first_look
    assert look is not None
    show(look, trainer)
    assert TITLE in capsys.readouterr().out
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    show(look, trainer)
    assert TITLE not in capsys.readouterr().out
    assert len(said()) == 2


def test_a_look_that_fails_is_a_warning_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    def fail(*args: Any) -> None:
        raise KeyError("no such layer")

    expected = trained(make_trainer(tmp_path, gpt2(), llama(), looks=False))[0]
    monkeypatch.setattr(first_look, "look_at_start", fail)
    trainer = make_trainer(tmp_path, gpt2(), llama())
    assert same(trained(trainer)[0], expected)
    assert trainer.first_look is None
    assert said() == ["The look at the first batch failed (KeyError: 'no such layer'). Training goes on."]
    assert not trainer.guidance_loss.keeps_layers


# ------------------------------------------------------------------------------------------------ nothing is changed


RUNS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], dict[str, Any]]] = {
    "dropout": (lambda: gpt2(dropout=0.2), llama, {}),
    "half precision": (lambda: gpt2(dropout=0.2), llama, {"bf16": True}),
    "batch norm in both": (Normed, NormNet, {"guide_batch_norm": "batch"}),
    "calibrated": (Normed, NormNet, {"guide_batch_norm": "calibrated", "calibration_batches": 2}),
    "micro-batches": (lambda: gpt2(dropout=0.2), llama, {"gradient_accumulation_steps": 2}),
    "micro-batches of a plain module": (Normed, llama, {"gradient_accumulation_steps": 2}),
    "accumulated": (
        lambda: gpt2(dropout=0.2),
        llama,
        {"gradient_accumulation_steps": 2, "similarity_batch": "accumulated"},
    ),
    "some tokens": (lambda: gpt2(dropout=0.2), llama, {"sample_axis": "token", "max_tokens": 9}),
    "within": (lambda: gpt2(dropout=0.2), llama, {"sample_axis": "within"}),
    "some rows": (lambda: gpt2(dropout=0.2), llama, {"guide_rows": 3}),
    "pre-alignment": (lambda: gpt2(dropout=0.2), llama, {"guide_input": "prealign_noise", "prealign_steps": 2}),
    "shuffled": (lambda: gpt2(dropout=0.2), llama, {"guide_input": "shuffled"}),
    "checkpointing": (
        lambda: gpt2(dropout=0.2),
        llama,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ),
    "reentrant checkpointing": (
        lambda: gpt2(dropout=0.2),
        llama,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "a guide of which some is skipped": (lambda: gpt2(dropout=0.2), llama, {"layer_mapping": "last_1"}),
}


@pytest.mark.parametrize(("make_target", "make_guide", "settings"), RUNS.values(), ids=RUNS.keys())
def test_a_run_with_a_look_ends_bit_for_bit_as_one_without(
    tmp_path: Path, make_target: Callable[[], nn.Module], make_guide: Callable[[], nn.Module], settings: dict[str, Any]
) -> None:
    found: list[Any] = []
    for looks in (False, True):
        target, guide, config = make_target(), make_guide(), dict(settings)
        if isinstance(target, Normed):
            config |= {"target_layers": ["norm", "out"]}
        if isinstance(guide, NormNet):
            config |= {"guide_layers": ["norm", "out"]}
        trainer = make_trainer(tmp_path, target, guide, looks=looks, **config)
        expected, logs = trained(trainer)
        states = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        found.append((expected, weights(guide), logs, states))
    assert (trainer.first_look is not None) == looks
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        assert same(one, other)
    assert found[0][2:] == found[1][2:]
    look = trainer.first_look
    assert look is not None
    unmeasured = {"pre-alignment": "pre-alignment has no task loss", "reentrant": "reentrant activation checkpointing"}
    expected = next((why for name, why in unmeasured.items() if settings is RUNS.get(name, (0, 0, 0))[2]), "")
    if settings.get("gradient_checkpointing_kwargs") == {"use_reentrant": True}:
        expected = unmeasured["reentrant"]
    assert look.not_measured == expected
    assert (look.gradient_ratio is None) == bool(expected)


@pytest.mark.parametrize("scale", [2.0**10, 2.0**128 * 0.99], ids=["that fits", "that overflows"])
def test_under_a_loss_scaler_a_run_is_the_same_and_the_ratio_is_measured(tmp_path: Path, scale: float) -> None:
    found = []
    for looks in (False, True):
        trainer = make_trainer(tmp_path, gpt2(dropout=0.2), llama(), looks=looks, max_steps=4)
        trainer.accelerator.native_amp, trainer.accelerator.state._mixed_precision = True, "fp16"
        # accelerate itself sets one up on GPUs only
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        found.append(trained(trainer))
    assert same(found[0][0], found[1][0])
    assert str(found[0][1]) == str(found[1][1])  # with norms that are nan
    assert trainer.first_look is not None
    assert 0 < (trainer.first_look.gradient_ratio or 0) < 1000


def test_gradients_modes_and_buffers_are_as_before_also_after_an_error() -> None:
    network = Normed().train()
    network.drop.eval()
    network.out.weight.grad = torch.ones_like(network.out.weight)
    before = weights(network)

    def disturb() -> None:
        network.eval()
        network.norm.running_mean += 1  # type: ignore[operator]
        torch.rand(3), random.random(), np.random.rand()

    for error in (False, True):
        state = torch.get_rng_state(), random.getstate()
        try:
            with unchanged(network):
                disturb()
                if error:
                    raise KeyError
        except KeyError:
            pass
        assert same(weights(network), before)
        assert [module.training for module in (network, network.norm, network.drop)] == [True, True, False]
        assert torch.equal(torch.get_rng_state(), state[0])
        assert random.getstate() == state[1]


def test_a_look_costs_no_forward_but_those_of_the_target_where_the_item_count_matters(
    tmp_path: Path,
) -> None:
    for accumulation, ours in ((1, [True] * 3), (2, [True, False, False, *[True] * 5])):
        target, guide, modes, runs = gpt2(), llama(), [], []
        target.register_forward_hook(lambda module, args, output, modes=modes: modes.append(module.training))
        guide.register_forward_hook(lambda module, args, output, runs=runs: runs.append(module.training))
        make_trainer(tmp_path, target, guide, gradient_accumulation_steps=accumulation).train()
        assert modes == ours
        assert runs == [False] * (3 * accumulation)


# ---------------------------------------------------------------------------------------------------- the gradients


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("make_target", [gpt2, PlainNet])
def test_the_ratio_is_that_of_the_gradients_in_the_weights_that_guidance_reaches(
    tmp_path: Path, make_target: Callable[[], nn.Module], accumulation: int
) -> None:
    target, copy, guide, batches = make_target(), make_target(), llama(), []
    target.register_forward_pre_hook(lambda m, args, kwargs: batches.append(dict(kwargs)), with_kwargs=True)
    layers = PLAIN if make_target is PlainNet else {}
    settings = {"guidance_weight": 0.7, "gradient_accumulation_steps": accumulation, **layers}
    trainer = make_trainer(tmp_path, target, guide, **settings)
    trainer.train()
    batch = {name: batches[0][name] for name in ("input_ids", "labels")}
    loss = GuidanceLoss(copy, llama(), trainer.guidance)
    with loss.watch(batch) as watched:
        outputs = copy(**watched.inputs)
    task = gradients(copy, outputs[0])
    guided = torch.autograd.grad(0.7 * loss_of(copy, loss, batch), list(copy.parameters()), allow_unused=True)
    reached = [i for i, g in enumerate(guided) if g is not None]
    above, below = (torch.cat([g[i].flatten() for i in reached]).norm().item() for g in (guided, task))
    assert trainer.first_look is not None
    assert trainer.first_look.gradient_ratio == pytest.approx(above / below, rel=1e-4)


def test_the_ratio_is_that_at_the_full_weight_also_while_guidance_warms_up(tmp_path: Path) -> None:
    runs = [make_trainer(tmp_path, gpt2(), llama(), guidance_warmup_steps=steps) for steps in (0, 3)]
    for trainer in runs:
        trainer.train()
    assert runs[1].first_look == runs[0].first_look
    assert [round(log["guidance/weight"], 3) for log in train_logs(runs[1])] == [0.333, 0.667, 1]


def loss_of(target: nn.Module, loss: GuidanceLoss, batch: dict[str, Tensor]) -> Tensor:
    with loss.watch(batch) as watched:
        target(**watched.inputs)
    assert watched.loss is not None
    return watched.loss


@pytest.mark.parametrize("why", ["FSDP", "DeepSpeed", "torch.compile", "a static graph of DDP", "Liger"])
def test_a_graph_that_cannot_be_used_twice_is_left_alone(
    tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    trainer = make_trainer(tmp_path, gpt2(), llama())
    inner, calls = first_look.look_at_start, []

    def look(trainer: Any, model: nn.Module, *rest: Any) -> Any:
        with monkeypatch.context() as patch:
            if why in ("FSDP", "DeepSpeed"):
                patch.setattr(trainer, f"is_{why.lower()}_enabled", True)
            elif why == "torch.compile":
                patch.setattr(trainer.model.transformer.h[0], "_compiled_call_impl", print)
            elif why == "Liger":
                patch.setattr(trainer.args, "use_liger_kernel", True)
            else:
                patch.setattr(model, "static_graph", True, raising=False)
            calls.append(1)
            return inner(trainer, model, *rest)

    monkeypatch.setattr(first_look, "look_at_start", look)
    trainer.train()
    assert calls == [1]
    assert trainer.first_look is not None
    assert trainer.first_look.gradient_ratio is None
    assert trainer.first_look.not_measured.startswith(why)
    assert said() == []


# ------------------------------------------------------------------------------------------------------- warnings


def first_warnings(folder: Path, target: nn.Module, guide: nn.Module, **settings: Any) -> list[str]:
    """Train for one step, and return the warnings of its look."""
    trainer = make_trainer(folder, target, guide, max_steps=1, **settings)
    trainer.train()
    assert trainer.first_look is not None
    return trainer.first_look.warnings


class Wide(nn.Module):
    """A target whose layer has far more features than there are rows, at random."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(seeded(lambda: torch.randn(32, 4000), 1))
        self.wide, self.out = nn.Identity(), seeded(lambda: nn.Linear(4000, VOCABULARY), 2)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.out(self.wide(self.rows))
        return nn.functional.cross_entropy(logits, labels[:, 0]), logits


@pytest.mark.parametrize("measure", ["ridge", "linear_cka", "debiased_cka", "ridge_loo"])
def test_unrelated_features_on_few_rows_start_full_by_some_measures(
    tmp_path: Path, measure: str, said: Callable[[], list[str]]
) -> None:
    guide = Fixed(seeded(lambda: torch.randn(32, 4000), 0))
    settings = {"train_dataset": token_rows(32), "per_device_train_batch_size": 32, "guidance_weight": 10.0}
    settings |= {"target_layers": ["wide"], "guide_layers": ["layer"]}
    found = first_warnings(tmp_path, Wide(), guide, measure=measure, **settings)
    full = measure in ("ridge", "linear_cka")
    assert [words.startswith(f"{measure} starts at 0.9") for words in found] == [True] * full
    assert said() == found


@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_dead_layers_of_the_guide_are_named(tmp_path: Path, mode: str, said: Callable[[], list[str]]) -> None:
    guide = NormNet()
    nn.init.zeros_(guide.norm.weight)
    settings = {"guide_layers": ["embed", "norm", "out"], "guide_batch_norm": mode, "guidance_weight": 0.1}
    (words,) = first_warnings(tmp_path, gpt2(), guide, **settings)
    assert words.startswith("2 of 3 guide layers are dead: norm, out. ")
    assert ("guide_batch_norm='calibrated'" in words) == (mode == "eval")
    assert said() == [words]


class Enlarge(nn.Module):
    """Give the first token a thousand times the features of the others."""

    def forward(self, features: Tensor) -> Tensor:
        factors = torch.ones(features.shape[1], 1)
        factors[0] = 1000
        return features * factors


def first_is_huge() -> PlainNet:
    network = PlainNet(seed=2)
    network.body[0] = nn.Sequential(network.body[0], Enlarge())
    return network


@pytest.mark.parametrize("axis", ["token", "within"])
@pytest.mark.parametrize("side", ["target", "guide"])
def test_massive_activations_are_named_with_their_side_until_they_are_left_out(
    tmp_path: Path, side: str, axis: str
) -> None:
    networks = {"target": PlainNet(), "guide": PlainNet(seed=1)} | {side: first_is_huge()}
    layers = {"target_layers": ["body.0"], "guide_layers": ["body.0"], "measure": "debiased_cka"}
    settings = {"sample_axis": axis, "train_dataset": token_rows(8, length=64), **layers}
    (words,) = first_warnings(tmp_path, networks["target"], networks["guide"], **settings)
    assert f"in 1 of 2 layers: {side} body.0 (" in words
    assert "skip_first_positions=1" in words
    assert first_warnings(tmp_path, networks["target"], networks["guide"], **settings, skip_first_positions=1) == []


@pytest.mark.parametrize("batch", ["local", "accumulated"])
def test_a_guide_that_masks_at_random_is_refused(tmp_path: Path, batch: str) -> None:
    settings: dict[str, Any] = {"similarity_batch": batch, "gradient_accumulation_steps": 2}
    settings |= {"guide_layers": ["masked"], "measure": "debiased_cka", "guidance_weight": 0.1}
    trainer = make_trainer(tmp_path, gpt2(), Random(), **settings)
    with pytest.raises(ValueError, match=r"the guide \(Random\) is random: two forwards of the same batch differ by"):
        trainer.train()


@pytest.mark.parametrize(("weight", "words"), [(1e4, "Lower guidance_weight, now 10000"), (1e-6, "Raise guidance_w")])
def test_a_weight_that_is_far_off_is_said(tmp_path: Path, weight: float, words: str) -> None:
    (found,) = first_warnings(tmp_path, gpt2(), llama(), guidance_weight=weight)
    assert words in found


class Deaf(PlainNet):
    """A target that accepts loss kwargs, and averages over its own micro-batch all the same."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, labels)


def test_a_loss_that_ignores_the_item_count_is_said_under_accumulation_alone(tmp_path: Path) -> None:
    settings = {**PLAIN, "guidance_weight": 0.01, "measure": "debiased_cka"}
    (words,) = first_warnings(tmp_path, Deaf(), llama(), **settings, gradient_accumulation_steps=4)
    assert "sums the task loss over the 4 micro-batches" in words
    assert first_warnings(tmp_path, Deaf(), llama(), **settings) == []


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return (
        nn.functional.cross_entropy(outputs[-1].flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch
    )


def declared(network: nn.Module) -> nn.Module:
    network.accepts_loss_kwargs = False  # type: ignore[assignment]
    return network


# earlier versions of transformers smooth labels without asking for the count, so that Trainer sums such a loss
SMOOTHER_COUNTS = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters
COUNTED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], bool | None]] = {
    "used by the model": (gpt2, {}, True),
    "ignored": (Deaf, PLAIN, False),
    "not accepted": (PlainNet, PLAIN, None),
    "said not to be accepted": (lambda: declared(Deaf()), PLAIN, None),
    "used by label smoothing": (gpt2, {"label_smoothing_factor": 0.1}, SMOOTHER_COUNTS),
    "used by a loss of one's own": (Deaf, {**PLAIN, "compute_loss_func": own_loss}, True),
}


@pytest.mark.parametrize(("make_target", "settings", "expected"), COUNTED.values(), ids=COUNTED.keys())
def test_whether_the_item_count_is_used(
    tmp_path: Path, make_target: Callable[[], nn.Module], settings: dict[str, Any], expected: bool | None
) -> None:
    trainer = make_trainer(tmp_path, make_target(), llama(), gradient_accumulation_steps=2, max_steps=1, **settings)
    trainer.train()
    assert trainer.first_look is not None
    assert trainer.first_look.uses_item_count is expected
