"""`GuidanceTrainer` on tiny networks: DESIGN.md's invariants 1, 2, 3, 6 and 8, and each kind of run it supports."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    EVEN,
    LENGTH,
    VOCABULARY,
    MustNotRun,
    NormNet,
    PlainNet,
    arguments,
    cka,
    gpt2,
    guidance_by_hand,
    hidden_states,
    linear,
    llama,
    llama_config,
    module_outputs,
    seeded,
    token_rows,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from trainers import SGD, batches_of, descend, make_trainer, same, train_logs, trained, weights
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from hf_guidance import GuidanceTrainer, load_guide
from hf_guidance.targets import RNNConfig, RNNForCausalLM

gc.freeze()  # what is imported by now; Trainer collects garbage at every start, and half a second would go into that

STILL = {**SGD, "learning_rate": 0.0}  # the weights stay, so that every step can be told by hand


def rnn(seed: int = 0) -> RNNForCausalLM:
    return seeded(lambda: RNNForCausalLM(RNNConfig(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2)), seed)


# target, the layers it is guided by (None: hidden states): the first and last accept loss kwargs, the second does not
TARGETS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "gpt2": (gpt2, {}),
    "plain module": (PlainNet, {"target_layers": ["body.1", "body.4"]}),
    "rnn": (rnn, {}),
}


@pytest.fixture(params=TARGETS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def count_forwards(network: nn.Module) -> list[bool]:
    """One entry per forward of a network from now on: whether it was in train mode."""
    modes: list[bool] = []
    network.register_forward_hook(lambda module, args, output: modes.append(module.training))
    return modes


def by_hand(kind: str, target: nn.Module, guide: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The guidance loss of one of `TARGETS` on one batch, from forwards of its own."""
    if kind != "plain module":
        return guidance_by_hand(target, guide, batch)
    ours = module_outputs(target, ["body.1", "body.4"], batch["input_ids"])
    with torch.no_grad():
        theirs = hidden_states(guide, {"input_ids": batch["input_ids"]})
    return sum((1 - cka(ours[t], theirs[g]) for t, g in EVEN), torch.tensor(0.0, dtype=torch.float64))


# ------------------------------------------------------------------------------------ invariant 1: without guidance


UNGUIDED: dict[str, tuple[Callable[[], nn.Module] | None, dict[str, Any]]] = {
    "no guide": (None, {}),
    "weight 0": (MustNotRun, {"guidance_weight": 0.0, "guide_layers": ["layer"]}),
    "weight 0, to be calibrated": (
        lambda: nn.Sequential(MustNotRun(), nn.BatchNorm1d(2)),
        {"guidance_weight": 0.0, "guide_batch_norm": "calibrated", "guide_layers": ["0"]},
    ),
}


@pytest.mark.parametrize(("make_guide", "config"), UNGUIDED.values(), ids=UNGUIDED.keys())
@pytest.mark.parametrize("make_target", [lambda: gpt2(dropout=0.2), lambda: PlainNet(dropout=0.2)], ids=["hf", "plain"])
def test_without_guidance_losses_and_weights_are_plain_trainers_bit_for_bit(
    tmp_path: Path, make_target: Callable[[], nn.Module], make_guide: Callable[[], nn.Module] | None, config: Any
) -> None:
    shape = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    data = {"train_dataset": token_rows(), "eval_dataset": token_rows(8, seed=1)}
    plain = Trainer(model=make_target(), args=arguments(tmp_path, **shape), **data)
    expected = trained(plain)[0]
    guide = make_guide() if make_guide else None
    guided = make_trainer(tmp_path, make_target(), guide, **data, **config, **shape)
    assert same(trained(guided)[0], expected)
    timing = ("time", "per_second")
    expected_logs, got_logs = (
        [{k: v for k, v in log.items() if not k.endswith(timing)} for log in trainer.state.log_history]
        for trainer in (plain, guided)
    )
    of_training = [log for log in got_logs if "loss" in log]
    assert len(of_training) == 3
    found = [log.pop("task/loss", None) for log in of_training]
    losses = [log["loss"] for log in of_training]
    assert found == (pytest.approx(losses) if make_guide else [None] * 3)
    assert got_logs == expected_logs


def test_without_guide_the_task_loss_is_logged_if_there_are_settings_and_else_the_logs_are_plain_trainers(
    tmp_path: Path,
) -> None:
    logs = []
    for kind in (Trainer, GuidanceTrainer, partial(GuidanceTrainer, guidance=linear(guidance_weight=0.0))):
        trainer = kind(model=gpt2(dropout=0.2), args=arguments(tmp_path), train_dataset=token_rows())
        trainer.train()
        logs.append([{k: v for k, v in log.items() if "loss" in k or k == "step"} for log in trainer.state.log_history])
    assert logs[0] == logs[1]
    assert {name for log in logs[1] for name in log} == {"loss", "train_loss", "step"}
    assert [log["task/loss"] for log in logs[2] if "loss" in log] == [log["loss"] for log in logs[0] if "loss" in log]


def test_the_guide_is_not_run_once_the_stop_step_is_reached(tmp_path: Path) -> None:
    guide = llama()
    runs = count_forwards(guide)
    trainer = make_trainer(tmp_path, gpt2(), guide, guidance_stop_step=2, gradient_accumulation_steps=2, looks=False)
    logs = trained(trainer)[1]
    assert runs == [False] * 4
    assert ["guidance/loss" in log for log in logs] == [True, True, False]
    assert [log["guidance/weight"] for log in logs] == [1.0, 1.0, 0.0]
    assert logs[2]["task/loss"] == pytest.approx(logs[2]["loss"], rel=1e-6)


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_what_is_printed_leaves_out_the_single_pairs(
    tmp_path: Path, disable_tqdm: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path, gpt2(), llama(), disable_tqdm=disable_tqdm)
    logs = trained(trainer)[1]
    printed = capsys.readouterr().out
    assert "'guidance/loss'" in printed
    assert "/hidden_states" not in printed
    assert any("hidden_states" in key for key in logs[0])


# ------------------------------------------------------------------------------------- invariant 2: the frozen guide


@pytest.mark.parametrize("mode", ["eval", "batch", "calibrated"])
def test_the_guide_keeps_every_bit_and_is_in_no_optimizer_and_no_checkpoint(tmp_path: Path, mode: str) -> None:
    target, guide = gpt2(), NormNet().train()
    config = {"guide_layers": ["norm", "out"], "guide_batch_norm": mode, "calibration_batches": 2}
    before: dict[str, Tensor] = {}

    class Before(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            before.update(weights(guide))

    trainer = make_trainer(tmp_path, target, guide, **config, save_strategy="steps", save_steps=2, callbacks=[Before()])
    trainer.train()
    assert same(weights(guide), before)
    optimised = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert optimised == {id(parameter) for parameter in target.parameters()}
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved.keys() <= target.state_dict().keys()
    assert not list((tmp_path / "checkpoint-2").glob("*guide*.*t*")), "no weights of the guide"


def test_calibrated_batch_norm_uses_the_mean_statistics_of_the_first_batches(tmp_path: Path) -> None:
    guide, data = NormNet(), token_rows()
    config = {"guide_layers": ["out"], "guide_batch_norm": "calibrated", "calibration_batches": 3}
    make_trainer(tmp_path, gpt2(), guide, **config, max_steps=1).train()
    embedded = guide.embed(torch.stack([row["input_ids"] for row in data[:12]])).reshape(3, 4, LENGTH, 8)
    mean = embedded.mean((1, 3)).mean(0)
    variance = embedded.transpose(1, 2).flatten(2).var(2).mean(0)
    torch.testing.assert_close(guide.norm.running_mean, mean)
    torch.testing.assert_close(guide.norm.running_var, variance)
    assert not guide.norm.training


def test_calibration_leaves_the_data_order_and_dropout_as_they_are(tmp_path: Path) -> None:
    seen = []
    for config in ({}, {"guide_batch_norm": "calibrated", "calibration_batches": 2}):
        target = gpt2(dropout=0.3)
        seen.append(batches_of(target))
        trainer = make_trainer(tmp_path, target, NormNet(), guide_layers=["embed"], **config)
        seen.append([trained(trainer)[0]])  # the guide's embeddings come before its batch norm
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(seen[0], seen[2], strict=True))
    assert same(seen[1][0], seen[3][0])


def test_words_when_the_data_is_too_short_to_calibrate_on(tmp_path: Path) -> None:
    config = {"guide_layers": ["out"], "guide_batch_norm": "calibrated", "calibration_batches": 7}
    trainer = make_trainer(tmp_path, gpt2(), NormNet(), **config)
    with pytest.raises(ValueError, match="calibration_batches is 7, but the training data has 6 full batches"):
        trainer.train()


# ----------------------------------------------------------------------- invariant 3, and the size of both gradients


def test_the_target_is_forwarded_once_per_micro_step(tmp_path: Path, kind: str) -> None:
    make_target, layers = TARGETS[kind]
    target, guide = make_target(), llama()
    ours, theirs = count_forwards(target), count_forwards(guide)
    make_trainer(tmp_path, target, guide, **layers, gradient_accumulation_steps=2, looks=False).train()
    assert ours == [True] * 6
    assert theirs == [False] * 6


def summed_cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs[0] if isinstance(outputs, tuple) else outputs.logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch


def task_by_hand(kind: str, target: nn.Module, batch: dict[str, Tensor], own_loss: bool) -> Tensor:
    """The mean task loss of one batch; a language model predicts the next token, the rest the label in its place."""
    outputs = target(input_ids=batch["input_ids"])
    logits = outputs[0] if isinstance(outputs, tuple) else outputs.logits
    labels = batch["labels"]
    if kind != "plain module" and not own_loss:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("own_loss", [False, True], ids=["the model's loss", "compute_loss_func"])
@pytest.mark.parametrize(
    "shape",
    [
        {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": 1},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 1},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": -1, "num_train_epochs": 1},
    ],
    ids=["1x16", "4x4", "4x4 and 2x4"],
)
def test_an_optimizer_step_follows_the_mean_over_its_micro_batches(
    tmp_path: Path, kind: str, shape: dict[str, Any], own_loss: bool
) -> None:
    make_target, layers = TARGETS[kind]
    target, copy, guide, weight = make_target(), make_target(), llama(), 0.7
    batches = batches_of(target)
    function = {"compute_loss_func": summed_cross_entropy} if own_loss else {}
    data = {"train_dataset": with_labels_apart(24)}
    make_trainer(tmp_path, target, guide, **data, **layers, **shape, **SGD, **function, guidance_weight=weight).train()
    steps = shape["gradient_accumulation_steps"]
    for group in (batches[i : i + steps] for i in range(0, len(batches), steps)):
        losses = [
            task_by_hand(kind, copy, {"labels": labels, "input_ids": batch["input_ids"]}, own_loss)
            + weight * by_hand(kind, copy, guide, batch)
            for batch, labels in ((batch, labels_apart(batch["input_ids"])) for batch in group)
        ]
        descend(copy, torch.stack(losses).mean())
    torch.testing.assert_close(weights(target), weights(copy), rtol=1e-4, atol=2e-6)


def test_guidance_counts_once_in_a_step_whatever_the_accumulation(tmp_path: Path, kind: str) -> None:
    make_target, layers = TARGETS[kind]
    rows, runs, in_order = token_rows(4), [], {**SGD, "train_sampling_strategy": "sequential", "max_steps": 1}
    for steps in (1, 2, 4):  # so many times the same rows
        options = {"train_dataset": rows * steps, "gradient_accumulation_steps": steps, **layers, **in_order}
        end, (log,) = trained(make_trainer(tmp_path, make_target(), llama(), **options))
        runs.append((end, {name: log[name] for name in ("loss", "task/loss", "guidance/loss", "grad_norm")}))
    for end, log in runs[1:]:
        assert log == pytest.approx(runs[0][1], rel=1e-5)
        torch.testing.assert_close(end, runs[0][0], rtol=1e-5, atol=1e-6)


class Autoencoder(PlainNet):
    """Accepts loss kwargs, but gets no labels, so that Trainer counts no items and divides its loss after all."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return super().forward(input_ids, labels=input_ids)


def test_an_optimizer_step_follows_the_mean_also_where_trainer_counts_no_items(tmp_path: Path) -> None:
    target, copy, guide = Autoencoder(), Autoencoder(), llama()
    batches, data = batches_of(target), [{"input_ids": row["input_ids"]} for row in token_rows()]
    settings = {"target_layers": ["body.1", "body.4"], "gradient_accumulation_steps": 4, "max_steps": 1, **SGD}
    trainer = make_trainer(tmp_path, target, guide, train_dataset=data, **settings)
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    losses = [copy(**batch)[0] + by_hand("plain module", copy, guide, batch) for batch in batches]
    descend(copy, torch.stack(losses).mean())
    torch.testing.assert_close(weights(target), weights(copy), rtol=1e-4, atol=2e-6)


def labels_apart(ids: Tensor) -> Tensor:
    """Labels that are not the inputs; Trainer counts as many whether or not the loss shifts them."""
    return torch.cat([torch.full_like(ids[..., :1], -100), ids[..., 1:] * 5 % VOCABULARY], -1)


def with_labels_apart(rows: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": row["input_ids"], "labels": labels_apart(row["input_ids"])} for row in token_rows(rows)]


# --------------------------------------------------------------------------------------------- invariant 8: the logs


@pytest.mark.parametrize("accumulation", [1, 2])
def test_logged_loss_is_task_plus_weight_times_guidance(tmp_path: Path, kind: str, accumulation: int) -> None:
    make_target, layers = TARGETS[kind]
    shape = {"gradient_accumulation_steps": accumulation, "logging_steps": 3}
    trainer = make_trainer(tmp_path, make_target(), llama(), guidance_weight=0.7, **layers, **shape)
    (log,) = trained(trainer)[1]
    assert log["guidance/weight"] == pytest.approx(0.7)
    assert log["loss"] == pytest.approx(log["task/loss"] + 0.7 * log["guidance/loss"], rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_logged_values_are_means_over_micro_steps(tmp_path: Path, kind: str, accumulation: int) -> None:
    make_target, layers = TARGETS[kind]
    target, guide = make_target(), llama()
    batches = batches_of(target)
    shape = {"gradient_accumulation_steps": accumulation, "logging_steps": 2, "max_steps": 4}
    trainer = make_trainer(tmp_path, target, guide, **layers, **shape, **STILL)
    logs = trained(trainer)[1]
    half = len(batches) // 2
    for log, part in zip(logs, (batches[:half], batches[half:]), strict=True):
        guidance = [by_hand(kind, target, guide, batch).item() for batch in part]
        task = [task_by_hand(kind, target, batch, own_loss=False).item() for batch in part]
        assert log["guidance/loss"] == pytest.approx(sum(guidance) / len(part), abs=1e-5)
        assert log["task/loss"] == pytest.approx(sum(task) / len(part), abs=1e-5)
        pairs = [value for name, value in log.items() if name.startswith("guidance/similarity/")]
        assert len(pairs) == 3
        assert log["guidance/loss"] == pytest.approx(sum(1 - value for value in pairs), abs=1e-5)


def test_log_keys_name_each_measure_and_pair(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gpt2(), llama(), log_measures=["rsa"], max_steps=1)
    (log,) = trained(trainer)[1]
    pairs = ["hidden_states.1~hidden_states.1", "hidden_states.2~hidden_states.2", "hidden_states.2~hidden_states.3"]
    expected = {f"guidance/{group}/{pair}" for group in ("similarity", "rsa") for pair in pairs}
    expected |= {"guidance/loss", "guidance/similarity", "guidance/weight", "task/loss"}
    assert {key for key in log if "/" in key} == expected


def test_an_evaluation_between_two_logs_leaves_their_means_alone(tmp_path: Path) -> None:
    shape = {"logging_steps": 4, "max_steps": 4, "eval_strategy": "steps"}
    runs = [make_trainer(tmp_path, gpt2(), llama(), eval_dataset=token_rows(8), eval_steps=n, **shape) for n in (1, 4)]
    (first,), (second,) = (trained(trainer)[1] for trainer in runs)
    assert first == second


def test_what_an_interrupted_call_had_summed_up_is_not_in_the_next_log(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    shape = {"gradient_accumulation_steps": 2, "guide_input": "noise"}
    stop, trainer = Stop(), make_trainer(tmp_path, gpt2(), llama(), **shape, **STILL)
    trainer.add_callback(stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    again, anew = trained(trainer)[1], trained(make_trainer(tmp_path, gpt2(), llama(), **shape, **STILL))[1]
    assert again == anew


def test_the_progress_bar_leaves_out_the_single_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, gpt2(), llama(), disable_tqdm=False).train()
    printed = capsys.readouterr().out
    assert "guidance/loss" in printed
    assert "guidance/similarity':" in printed
    assert "guidance/similarity/" not in printed


# ------------------------------------------------------------------------------------------- invariant 6: resumption


def lstm_guide() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.LSTM(8, 8, batch_first=True)), 4)


RESUMED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "constant": (llama, {}),
    "linear, stopping": (llama, {"guidance_schedule": "linear", "guidance_stop_step": 5}),
    "cosine": (llama, {"guidance_schedule": "cosine"}),
    "some tokens": (llama, {"sample_axis": "token", "max_tokens": 9}),
    "noise": (llama, {"guide_input": "noise"}),
    "noise while pre-aligning": (llama, {"guide_input": "prealign_noise", "prealign_steps": 4}),
    "shuffled": (llama, {"guide_input": "shuffled"}),
    "calibrated": (NormNet, {"guide_layers": ["out"], "guide_batch_norm": "calibrated", "calibration_batches": 2}),
    "plain guide": (lstm_guide, {"guide_layers": ["LSTM"]}),
}


@pytest.mark.parametrize(("make_guide", "config"), RESUMED.values(), ids=RESUMED.keys())
def test_a_resumed_run_ends_in_the_same_weights_as_an_unbroken_one(
    tmp_path: Path, make_guide: Callable[[], nn.Module], config: dict[str, Any]
) -> None:
    shape = {"max_steps": 6, "gradient_accumulation_steps": 2, "train_dataset": token_rows(40)}
    saving = {"save_strategy": "steps", "save_steps": 3}
    unbroken = make_trainer(tmp_path / "a", gpt2(dropout=0.2), make_guide(), **shape, **saving, **config)
    resumed = make_trainer(tmp_path / "b", gpt2(seed=5, dropout=0.2), make_guide(), **shape, **config)
    expected = trained(unbroken)
    torch.rand(3)
    got = trained(resumed, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert same(got[0], expected[0])
    assert [log["loss"] for log in got[1][-3:]] == [log["loss"] for log in expected[1][-3:]]


def test_resuming_in_the_same_process_goes_on_with_the_same_guide(tmp_path: Path) -> None:
    config = {"guide_layers": ["out"], "guide_batch_norm": "calibrated", "calibration_batches": 2}
    saving, guide = {"save_strategy": "steps", "save_steps": 2}, NormNet()
    first = make_trainer(tmp_path, gpt2(), guide, **config, **saving)
    expected = trained(first)[0]
    again = make_trainer(tmp_path, gpt2(seed=5), guide, **config, **saving)
    assert same(trained(again, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))[0], expected)


def test_words_when_a_run_is_resumed_with_another_guide(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, gpt2(), load_guide(llama_config(), seed=3), **saving).train()
    other = make_trainer(tmp_path, gpt2(), load_guide(llama_config(), seed=4), **saving)
    words = r"checkpoint-3 was guided by LlamaModel \(llama, untrained, seed 3.*trainer's guide is .*seed 4"
    with pytest.raises(ValueError, match=words):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("mode", ["eval", "calibrated"])
def test_a_saved_guide_resumes_the_run(tmp_path: Path, mode: str) -> None:
    config = {"guide_layers": ["out"], "guide_batch_norm": mode, "calibration_batches": 2, "save_guide": True}
    saving, trained_guide = {"save_strategy": "steps", "save_steps": 2}, NormNet(seed=6)
    expected = trained(make_trainer(tmp_path, gpt2(), trained_guide, **config, **saving))[0]
    guide = NormNet(seed=8)
    guide.load_state_dict(load_file(tmp_path / "guide" / "model.safetensors"))
    again = make_trainer(tmp_path, gpt2(), guide, **config, **saving)
    assert same(trained(again, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))[0], expected)


def test_a_saved_transformers_guide_loads_as_a_guide(tmp_path: Path) -> None:
    guide = llama(seed=6)
    make_trainer(tmp_path, gpt2(), guide, save_guide=True, max_steps=1).train()
    assert same(weights(load_guide(tmp_path / "guide")), weights(guide))


# ------------------------------------------------------------------------------------------------- what is written


def test_every_checkpoint_and_saved_model_holds_the_guidance_config_and_the_guides_identity(tmp_path: Path) -> None:
    guide = llama()
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = make_trainer(tmp_path / "run", gpt2(), guide, guidance_weight=0.3, **saving)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    folders = [tmp_path / "run" / "checkpoint-1", tmp_path / "run" / "checkpoint-2", tmp_path / "model"]
    for folder in folders:
        written = json.loads((folder / "guidance_config.json").read_text())
        assert linear(**written["guidance"]) == trainer.guidance
        assert written["guidance"]["guidance_weight"] == 0.3
        assert written["guide"]["architecture"] == "LlamaModel"
        assert written["guide"]["parameters"] == sum(p.numel() for p in guide.parameters())
    assert len({(folder / "guidance_config.json").read_text() for folder in folders}) == 1


def test_without_a_guide_no_guidance_config_is_written(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", gpt2()).save_model(str(tmp_path / "model"))
    assert (tmp_path / "model" / "config.json").exists()
    assert not (tmp_path / "model" / "guidance_config.json").exists()


# --------------------------------------------------------------------------------------------- evaluation, columns


def test_eval_loss_is_the_tasks_alone_and_predictions_have_no_hidden_states(tmp_path: Path) -> None:
    target, guide, data = gpt2(), llama(), token_rows(8, seed=1)
    runs = count_forwards(guide)
    trainer = make_trainer(tmp_path, target, guide, eval_dataset=data)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        expected = target.eval()(**batch)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    predictions = trainer.predict(data).predictions
    torch.testing.assert_close(torch.as_tensor(predictions), expected.logits)
    assert runs == []


def test_the_guides_columns_reach_the_guide_and_never_the_target(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{name: value.tolist() for name, value in row.items()} for row in token_rows(8)]
    own = [{"guide_input_ids": [n + 5 for n in row["input_ids"]], "guide_attention_mask": [1] * LENGTH} for row in rows]
    dataset = datasets.Dataset.from_list([{**row, **mine, "note": [1, 2]} for row, mine in zip(rows, own, strict=True)])
    target, guide, ours, theirs = gpt2(), llama(vocabulary=22), [], []
    target.register_forward_pre_hook(lambda m, args, kwargs: ours.append(kwargs), with_kwargs=True)
    guide.register_forward_pre_hook(lambda m, args, kwargs: theirs.append(kwargs), with_kwargs=True)
    data = {"train_dataset": dataset, "eval_dataset": dataset}
    trainer = make_trainer(tmp_path, target, guide, **data, max_steps=2, looks=False)
    trainer.train()
    assert [set(kwargs) - {"output_hidden_states", "use_cache"} for kwargs in theirs] == [
        {"input_ids", "attention_mask"}
    ] * 2
    assert all(torch.equal(g["input_ids"], t["input_ids"] + 5) for t, g in zip(ours, theirs, strict=True))
    trainer.evaluate()
    for data in (dataset, dataset.remove_columns("labels")):
        assert trainer.predict(data).predictions.shape == (8, LENGTH, VOCABULARY)
    known = {"input_ids", "labels", "output_hidden_states", "num_items_in_batch"}
    assert [set(kwargs) - known for kwargs in ours] == [set()] * 5
    assert len(theirs) == 2


# ------------------------------------------------------------------------------------------- too few, and wrong input


def test_a_last_small_batch_is_trained_without_guidance_and_counted(tmp_path: Path) -> None:
    target, guide = gpt2(), llama()
    trainer = make_trainer(tmp_path, target, guide, train_dataset=token_rows(10), max_steps=-1, num_train_epochs=1)
    after: dict[int, dict[str, Tensor]] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            after[state.global_step] = weights(target)

    trainer.add_callback(Look())
    logs = trained(trainer)[1]
    assert [log.get("guidance/skipped_batches") for log in logs] == [None, None, 1]
    assert ["guidance/loss" in log for log in logs] == [True, True, False]
    assert logs[2]["loss"] == pytest.approx(logs[2]["task/loss"])
    assert not same(after[2], after[3])


def test_skipped_batches_are_summed_between_two_logs(tmp_path: Path) -> None:
    shape = {"train_dataset": token_rows(10), "max_steps": 6, "logging_steps": 6}
    (log,) = trained(make_trainer(tmp_path, gpt2(), llama(), **shape))[1]
    assert log["guidance/skipped_batches"] == 2, "one in each of two epochs"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size is 2, but linear_cka needs at least 3"),
        ({"per_device_train_batch_size": 3, "measure": "debiased_cka"}, "is 3, but debiased_cka needs at least 4"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size changes the batch size"),
        ({"target_layers": ["transformer.h.7"]}, r"target layer 'transformer.h.7' not found.*transformer\.h\.0"),
        ({"guide_layers": ["layer"]}, r"guide layer 'layer' not found.*layers\.0 … layers\.2"),
        ({"guide_batch_norm": "calibrated"}, r"guide_batch_norm='calibrated', but the guide .*has no batch norm"),
    ],
)
def test_words_at_construction(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, gpt2(), llama(), **settings)


def test_on_the_token_axis_a_batch_may_have_fewer_rows(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gpt2(), llama(), per_device_train_batch_size=1, sample_axis="token")
    assert all(log["guidance/loss"] > 0 for log in trained(trainer)[1])


def test_words_at_construction_when_there_are_several_gpus_in_one_process(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs in one process.*accelerate launch"):
        GuidanceTrainer(model=gpt2(), guide=llama(), args=args, train_dataset=token_rows())


def test_words_at_construction_when_the_guide_is_the_target(tmp_path: Path) -> None:
    target = gpt2()
    with pytest.raises(ValueError, match=r"guide shares .* parameters with the target"):
        make_trainer(tmp_path, target, target)


def test_words_at_construction_when_vocabularies_differ_and_the_dataset_has_no_column_for_the_guide(
    tmp_path: Path,
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{name: value.tolist() for name, value in row.items()} for row in token_rows(8)]
    data = {"train_dataset": datasets.Dataset.from_list(rows)}
    with pytest.raises(ValueError, match=r"target's vocabulary has 17 tokens and the guide's 23.*guide_input_ids"):
        make_trainer(tmp_path, gpt2(), llama(vocabulary=23), **data)
    trainer = make_trainer(tmp_path, gpt2(), llama(vocabulary=23), **data, guide_shares_tokenizer=True, max_steps=1)
    assert trained(trainer)[1][0]["guidance/loss"] > 0


# ------------------------------------------------------------------------------------------ noise and pre-alignment


def test_noise_is_another_in_every_micro_step_and_for_every_seed_and_the_same_again(tmp_path: Path) -> None:
    def noise(seed: int) -> list[tuple[int, ...]]:
        guide = llama()
        guide.register_forward_pre_hook(lambda m, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True)
        ids: list[Tensor] = []
        shape = {"gradient_accumulation_steps": 2, "max_steps": 2}
        make_trainer(tmp_path, gpt2(), guide, guide_input="noise", seed=seed, **shape).train()
        return [tuple(batch.flatten().tolist()) for batch in ids]

    first, other = noise(seed=7), noise(seed=8)
    assert len({*first, *other}) == 8
    assert noise(seed=7) == first


def test_while_prealigning_on_noise_both_networks_see_it_and_after_that_the_batch(tmp_path: Path) -> None:
    target, guide, data = gpt2(), llama(), torch.stack([row["input_ids"] for row in token_rows()])
    theirs: list[Tensor] = []
    ours = batches_of(target)
    guide.register_forward_pre_hook(lambda m, args, kwargs: theirs.append(kwargs["input_ids"]), with_kwargs=True)
    make_trainer(tmp_path, target, guide, guide_input="prealign_noise", prealign_steps=2, looks=False).train()
    assert all(torch.equal(t["input_ids"], g) for t, g in zip(ours, theirs, strict=True))
    is_data = [[bool((data == row).all(1).any()) for row in batch] for batch in theirs]
    assert is_data == [[False] * 4, [False] * 4, [True] * 4]


def test_a_prealigning_step_follows_the_guidance_alone_with_every_parameter_in_the_graph(
    tmp_path: Path, kind: str
) -> None:
    make_target, layers = TARGETS[kind]
    target, copy, guide, in_graph = make_target(), make_target(), llama(), []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            in_graph.append(all(parameter.grad is not None for parameter in target.parameters()))

    batches = batches_of(target)
    settings = {**SGD, **layers, "prealign_steps": 1, "max_steps": 1, "guidance_weight": 0.7}
    trainer = make_trainer(tmp_path, target, guide, callbacks=[Look()], **settings)
    (log,) = trained(trainer)[1]
    descend(copy, 0.7 * by_hand(kind, copy, guide, batches[0]))
    torch.testing.assert_close(weights(target), weights(copy), rtol=1e-4, atol=1e-6)
    assert in_graph == [True]
    assert log["loss"] == pytest.approx(0.7 * log["guidance/loss"], rel=1e-5)


def test_the_task_joins_in_after_prealignment(tmp_path: Path) -> None:
    logs = trained(make_trainer(tmp_path, gpt2(), llama(), prealign_steps=2))[1]
    shares = [log["loss"] - log["guidance/loss"] for log in logs]
    assert shares == pytest.approx([0, 0, logs[2]["task/loss"]], abs=1e-5)


# --------------------------------------------------------------------------------------------- kinds of Trainer runs


def test_model_init_starts_anew_with_every_call_of_train(tmp_path: Path) -> None:
    made: list[nn.Module] = []

    def model_init() -> nn.Module:
        made.append(gpt2(dropout=0.2))
        return made[-1]

    trainer = make_trainer(tmp_path, None, llama(), model_init=model_init, guide_input="noise", max_steps=1)
    first, second = trained(trainer), trained(trainer)
    assert same(first[0], second[0])
    assert first[1] == second[1]
    assert [hooks_of(network) for network in made] == [0, 0, 0], "nor is the last model watched any more"
    assert trainer.guidance_loss.target is made[-1]


def hooks_of(network: nn.Module) -> int:
    """The hooks on a network itself; those inside are transformers' own too."""
    return len(network._forward_hooks) + len(network._forward_pre_hooks)


@pytest.mark.parametrize("fails", [False, True], ids=["finished", "stopped by an error"])
def test_a_finished_trainer_has_no_hooks_on_its_networks_and_puts_them_back(tmp_path: Path, fails: bool) -> None:
    target, guide, data = gpt2(), llama(), token_rows(8)
    callbacks = [Failing()] if fails else []
    trainer = make_trainer(tmp_path, target, guide, eval_dataset=data, eval_similarity=True, callbacks=callbacks)
    assert (hooks_of(target), hooks_of(guide)) == (2, 2)
    with pytest.raises(RuntimeError, match="a failure") if fails else nullcontext():
        trainer.train()
    assert (hooks_of(target), hooks_of(guide)) == (0, 0)
    trainer.is_in_train = False  # Trainer leaves it on after an error
    assert "eval_guidance/similarity" in trainer.evaluate()
    assert (hooks_of(target), hooks_of(guide)) == (0, 0)
    for callback in callbacks:
        trainer.remove_callback(callback)
    assert all("guidance/loss" in log for log in trained(trainer)[1])
    assert (hooks_of(target), hooks_of(guide)) == (0, 0)


class Failing(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a failure")


def test_two_trainers_share_a_guide_and_each_trains_as_alone(tmp_path: Path) -> None:
    alone = [trained(make_trainer(tmp_path, gpt2(seed), llama()))[0] for seed in (0, 1)]
    guide = llama()
    trainers = [make_trainer(tmp_path, gpt2(seed), guide) for seed in (0, 1)]
    assert all(same(trained(trainer)[0], expected) for trainer, expected in zip(trainers, alone, strict=True))


def test_trainers_in_two_threads_share_a_guide(tmp_path: Path) -> None:
    in_order = {"train_sampling_strategy": "sequential", "looks": False}  # the threads share the random state
    alone = [trained(make_trainer(tmp_path, gpt2(seed), llama(), **in_order))[0] for seed in (0, 1)]
    guide = llama()
    trainers = [make_trainer(tmp_path / str(seed), gpt2(seed), guide, **in_order) for seed in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        together = [weights_and_logs[0] for weights_and_logs in pool.map(trained, trainers)]
    assert all(map(same, together, alone))


def test_training_twice_goes_on_with_the_same_model(tmp_path: Path) -> None:
    target = gpt2()
    forwards = count_forwards(target)
    trainer = make_trainer(tmp_path, target, llama())
    trainer.train()
    trainer.train()
    assert len(forwards) == 6
    assert all("guidance/loss" in log for log in train_logs(trainer))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    shape = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = make_trainer(tmp_path, gpt2(), llama(), eval_dataset=token_rows(8, seed=1), **shape, **best)
    trainer.train()
    evaluated = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    step = max(evaluated, key=evaluated.__getitem__)
    assert step < 3, "the loss falls, and the largest counts as the best, so that it is not the last"
    kept = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in kept.items())


def test_an_endless_stream_trains_for_max_steps(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            while True:
                yield from token_rows()

    trainer = make_trainer(tmp_path, gpt2(), llama(), train_dataset=Stream(), guidance_schedule="linear")
    assert [log["guidance/weight"] for log in trained(trainer)[1]] == pytest.approx([1, 2 / 3, 1 / 3])
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        make_trainer(tmp_path, gpt2(), llama(), train_dataset=Stream(), max_steps=-1)


def test_an_adapted_target_learns_in_its_adapters_only(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, guide = gpt2(), llama()
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], r=2, fan_in_fan_out=True)
    target = seeded(lambda: peft.get_peft_model(base, lora), 0)
    batches, before = batches_of(target), weights(target)
    trainer = make_trainer(tmp_path, target, guide, gradient_accumulation_steps=2)
    after, logs = trained(trainer)
    assert {name for name in after if not torch.equal(before[name], after[name])} == {
        name for name in after if "lora_" in name
    }
    fresh = gpt2()  # an adapter starts as no change
    expected = sum(guidance_by_hand(fresh, guide, batch).item() for batch in batches[:2]) / 2
    assert logs[0]["guidance/loss"] == pytest.approx(expected, abs=1e-5)
    assert logs[0]["loss"] == pytest.approx(logs[0]["task/loss"] + logs[0]["guidance/loss"], rel=1e-5)


def test_label_smoothing_stays_the_tasks(tmp_path: Path) -> None:
    smoothing = {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}
    plain = trained(Trainer(gpt2(), arguments(tmp_path, **smoothing), train_dataset=token_rows()))[1]
    guided = trained(make_trainer(tmp_path, gpt2(), llama(), **smoothing))[1]
    assert guided[0]["task/loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    assert guided[0]["loss"] == pytest.approx(guided[0]["task/loss"] + guided[0]["guidance/loss"], rel=1e-5)


def test_bfloat16_runs_both_networks_in_bfloat16_and_the_comparison_in_float32(tmp_path: Path) -> None:
    target, guide = gpt2(), llama()
    dtypes, batches = set(), batches_of(target)
    guide.layers[0].mlp.down_proj.register_forward_hook(lambda m, args, output: dtypes.add(output.dtype))
    target.lm_head.register_forward_hook(lambda m, args, output: dtypes.add(output.dtype))
    trainer = make_trainer(tmp_path, target, guide, bf16=True, **STILL)
    logs = trained(trainer)[1]
    assert dtypes == {torch.bfloat16}
    for log, batch in zip(logs, batches[:], strict=True):
        assert log["guidance/loss"] == pytest.approx(guidance_by_hand(target, guide, batch).item(), abs=2e-2)


def test_activation_checkpointing_of_the_target_changes_nothing(tmp_path: Path) -> None:
    layers = {"target_layers": ["transformer.h.*.mlp"]}
    expected = trained(make_trainer(tmp_path, gpt2(dropout=0.2), llama(), **layers))[0]
    got = trained(make_trainer(tmp_path, gpt2(dropout=0.2), llama(), **layers, gradient_checkpointing=True))[0]
    torch.testing.assert_close(got, expected)


PLACES = {
    "whole": "cpu",
    "partly on disk": {"embed_tokens": "cpu", "layers": "disk", "norm": "cpu", "rotary_emb": "cpu"},
}


@pytest.mark.parametrize("device_map", PLACES.values(), ids=PLACES.keys())
def test_a_guide_placed_by_a_device_map_guides_from_where_it_is(tmp_path: Path, device_map: Any) -> None:
    llama().save_pretrained(tmp_path / "guide")
    target = gpt2()
    guide = load_guide(tmp_path / "guide", device_map=device_map, offload_folder=tmp_path / "disk")
    places = {parameter.device.type for parameter in guide.parameters()}
    assert places == ({"cpu"} if device_map == "cpu" else {"cpu", "meta"})
    batches = batches_of(target)
    logs = trained(make_trainer(tmp_path, target, guide, **STILL))[1]
    assert logs[0]["guidance/loss"] == pytest.approx(guidance_by_hand(target, llama(), batches[0]).item(), abs=1e-5)
    assert {parameter.device.type for parameter in guide.parameters()} == places


def test_a_bfloat16_guide_stays_in_bfloat16(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "guide")
    target, guide = gpt2(), load_guide(tmp_path / "guide", dtype=torch.bfloat16)
    batches = batches_of(target)
    logs = trained(make_trainer(tmp_path, target, guide, **STILL))[1]
    assert {parameter.dtype for parameter in guide.parameters()} == {torch.bfloat16}
    assert logs[0]["guidance/loss"] == pytest.approx(guidance_by_hand(target, llama(), batches[0]).item(), abs=2e-2)


@pytest.mark.parametrize("mark", [{"is_quantized": True}, {"hf_device_map": {"": 0}}], ids=["quantised", "dispatched"])
def test_a_guide_that_cannot_be_moved_is_not_moved(tmp_path: Path, mark: dict[str, Any]) -> None:
    class Fixed(nn.Sequential):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("`.to` is not supported for 4-bit or 8-bit models")

    guide = Fixed(nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8))
    for name, value in mark.items():
        setattr(guide, name, value)
    logs = trained(make_trainer(tmp_path, gpt2(), guide, guide_layers=["Linear"]))[1]
    assert all(log["guidance/loss"] > 0 for log in logs)


@pytest.mark.slow
def test_a_compiled_target_is_guided_as_an_uncompiled_one(tmp_path: Path) -> None:
    runs = [make_trainer(tmp_path, gpt2(), llama(), torch_compile=compiled, **SGD) for compiled in (False, True)]
    (expected, logs), (got, compiled_logs) = (trained(trainer) for trainer in runs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert [log["guidance/loss"] for log in compiled_logs] == pytest.approx(
        [log["guidance/loss"] for log in logs], abs=1e-4
    )


# ------------------------------------------------------------------------------------------------------ wrong types


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"guide": "gpt2"}, r"guide is 'gpt2'; expected a network: use load_guide\('gpt2'\)"),
        ({"guide": llama, "guidance": {"measure": "rsa"}}, "guidance is a dict; expected a GuidanceConfig"),
        ({"guidance": linear(guidance_weight=2)}, "guidance_weight is 2, but there is no guide"),
    ],
)
def test_what_is_not_a_guide_or_a_config_is_said_at_once(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    made = {name: value() if callable(value) else value for name, value in given.items()}
    with pytest.raises(ValueError, match=words):
        GuidanceTrainer(model=gpt2(), args=arguments(tmp_path), **made)


def test_a_target_that_torch_compile_returned_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the target is the result of torch.compile\(target\).*target.compile\(\)"):
        GuidanceTrainer(torch.compile(gpt2()), arguments(tmp_path), guide=llama())


def test_a_progress_callback_of_the_users_own_is_kept(tmp_path: Path) -> None:
    class Mine(ProgressCallback):
        pass

    trainer = make_trainer(tmp_path, gpt2(), llama(), disable_tqdm=False, callbacks=[Mine()])
    assert any(type(callback) is Mine for callback in trainer.callback_handler.callbacks)


@pytest.mark.parametrize(("every", "logging"), [(10, 10), (2, 2), (5, 10), (1, 3), (4, 3)])
def test_what_is_only_looked_at_is_in_every_log_with_a_guided_step(tmp_path: Path, every: int, logging: int) -> None:
    trainer = make_trainer(tmp_path, gpt2(), llama(), guidance_every=every, logging_steps=logging, max_steps=20)
    _, logs = trained(trainer)
    for number, log in enumerate(logs):
        guided = any(step % every == 0 for step in range(number * logging, (number + 1) * logging))
        assert ("guidance/debiased_cka/hidden_states.1~hidden_states.1" in log) == guided


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": "gpt2"}, r"model is 'gpt2'; expected a network: load it with from_pretrained\('gpt2'\)"),
        ({"args": {}}, r"args is a dict; expected TrainingArguments, such as TrainingArguments\('outputs'\)\.$"),
        ({"args": linear()}, r"args is a GuidanceConfig; .* Settings of guidance belong in guidance=\."),
    ],
)
def test_a_model_or_arguments_of_another_type_are_named(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    options = {"model": gpt2(), "args": arguments(tmp_path), **given}
    with pytest.raises(ValueError, match=words):
        GuidanceTrainer(**options, train_dataset=token_rows(), guide=llama())


def test_a_collator_that_returns_a_list_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gpt2(), llama(), data_collator=lambda rows: [row["input_ids"] for row in rows])
    with pytest.raises(
        ValueError, match=r"the batch is a list; expected a mapping .*let the data collator return a dict"
    ):
        trainer.train()
