"""Similarities on validation data: those of a plain `GuidanceLoss`, in every evaluation, without a trace elsewhere."""

from __future__ import annotations

import logging
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import EVEN, NormNet, PlainNet, cka, gpt2, hidden_states, llama, t5, token_rows
from launching import two_processes
from torch import Tensor, nn
from trainers import make_trainer, same, trained
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, default_data_collator

from hf_guidance import GuidanceConfig, GuidanceLoss, GuidanceMixin
from hf_guidance.trainer.evaluation import SimilarityMeans

SCRIPT = Path(__file__).parents[1] / "scripts" / "two_evaluations.py"
ROWS = token_rows(11, seed=1)  # in batches of 4, 4 and 3
NAMES = [f"hidden_states.{t + 1}~hidden_states.{g + 1}" for t, g in EVEN]
EVALUATING = {
    "measure": "linear_cka",
    "eval_similarity": True,
    "eval_dataset": ROWS,
    "per_device_eval_batch_size": 4,
}


def batches(rows: list[dict[str, Tensor]] = ROWS) -> list[dict[str, Tensor]]:
    return [default_data_collator(rows[i : i + 4]) for i in range(0, len(rows), 4)]


def by_hand(target: nn.Module, guide: nn.Module, batch: dict[str, Tensor]) -> list[float]:
    """Similarities of a batch, in the order of `NAMES`."""
    ids = {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        ours, theirs = hidden_states(target.eval(), ids), hidden_states(guide, ids)
    return [cka(ours[t], theirs[g]).item() for t, g in EVEN]


def mean_over_rows(values: list[list[float]], rows: list[int]) -> list[float]:
    return [sum(n * v for n, v in zip(rows, column, strict=True)) / sum(rows) for column in zip(*values, strict=True)]


def own(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "guidance" in name}


def test_each_pair_has_its_mean_over_the_rows_without_dropout(tmp_path: Path) -> None:
    target, guide = gpt2(dropout=0.5), llama()
    metrics = make_trainer(tmp_path, target, guide, **EVALUATING).evaluate()
    expected = mean_over_rows([by_hand(target, guide, batch) for batch in batches()], [4, 4, 3])
    found = [metrics[f"eval_guidance/similarity/{name}"] for name in NAMES]
    assert found == pytest.approx(expected, abs=1e-5)
    assert metrics["eval_guidance/similarity"] == pytest.approx(statistics.fmean(expected), abs=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"sample_axis": "token", "max_tokens": 9, "measure": "ridge"},
        {"guide_input": "noise"},
        {"guide_input": "prealign_noise", "prealign_steps": 2},
        {"guide_input": "shuffled"},
        {"guidance_schedule": "linear"},
        {"similarity_batch": "accumulated", "gradient_accumulation_steps": 2},
        {"layer_pairs": ["hidden_states.1~hidden_states.2@0", "hidden_states.2~hidden_states.3@3"]},
    ],
    ids=lambda config: ",".join(config) or "defaults",
)
def test_values_are_those_of_a_guidance_loss_on_the_same_batches(tmp_path: Path, config: dict[str, Any]) -> None:
    target, guide = gpt2(dropout=0.5), llama()
    trainer = make_trainer(tmp_path, target, guide, **EVALUATING | {"log_measures": ["rsa", "debiased_cka"]} | config)
    metrics = trainer.evaluate()
    alone = GuidanceConfig(
        measure=trainer.guidance.measure,
        log_measures=["rsa", "debiased_cka"],
        guide_input="batch" if "prealign_steps" in config else trainer.guidance.guide_input,
        **{name: getattr(trainer.guidance, name) for name in ("sample_axis", "max_tokens", "layer_pairs")},
    )
    loss, found = GuidanceLoss(target.eval(), guide, alone, seed=7), []
    for number, batch in enumerate(batches()):
        with torch.no_grad(), loss.watch(batch, micro_step=number) as watched:
            target(**watched.inputs)
        found.append({(m, pair): float(v) for m, values in watched.similarities.items() for pair, v in values.items()})
    for measure, pair in found[0]:
        rows = [n for n, values in zip((4, 4, 3), found, strict=True) if (measure, pair) in values]
        values = [[values[measure, pair]] for values in found if (measure, pair) in values]
        group = "similarity" if measure == alone.measure else measure
        (expected,) = mean_over_rows(values, rows)
        assert metrics[f"eval_guidance/{group}/{pair}"] == pytest.approx(expected, abs=1e-6)
    assert len(own(metrics)) == len(found[0]) + 1
    if alone.sample_axis == "sequence":
        assert len(found[2]) < len(found[0])  # debiased CKA needs four rows, and the last batch has three


class Drawing(nn.Module):
    """A target that draws random numbers in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = PlainNet(dropout=0.3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        loss, *rest = self.net(input_ids, labels=labels)
        return loss + 0 * torch.rand(()), *rest


@pytest.mark.parametrize("make", [lambda: gpt2(dropout=0.3), Drawing], ids=["gpt2", "draws"])
def test_training_and_its_evaluation_change_by_no_bit(tmp_path: Path, make: Any) -> None:
    layers = {} if make is not Drawing else {"target_layers": ["Linear"]}
    settings = {
        **EVALUATING,
        **layers,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
        "max_steps": 5,
    }
    ends, logs = [], []
    for on in (False, True):
        trainer = make_trainer(tmp_path, make(), llama(), **settings | {"eval_similarity": on})
        ends.append(trained(trainer)[0])
        logs.append(trainer.state.log_history)
    assert same(*ends)
    other = ("eval_guidance/", "eval_runtime", "eval_samples_per", "eval_steps_per", "train_")
    without, measured = ([{k: v for k, v in log.items() if not k.startswith(other)} for log in run] for run in logs)
    assert measured == without
    assert ["eval_guidance/similarity" in log for log in logs[1]] == ["eval_loss" in log for log in logs[1]]
    assert sum("eval_loss" in log for log in logs[1]) == 6


def test_it_is_measured_after_guidance_has_stopped_and_where_the_weight_is_0(tmp_path: Path) -> None:
    target, guide = gpt2(), llama()
    settings = EVALUATING | {"guidance_stop_step": 1, "guidance_every": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(tmp_path, target, guide, **settings)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 3]
    last = mean_over_rows([by_hand(target, guide, batch) for batch in batches()], [4, 4, 3])
    assert [logs[2][f"eval_guidance/similarity/{name}"] for name in NAMES] == pytest.approx(last, abs=1e-5)
    assert logs[0]["eval_guidance/similarity"] != logs[2]["eval_guidance/similarity"]


def test_several_sets_have_values_of_their_own_and_so_has_predict(tmp_path: Path) -> None:
    target, guide = gpt2(), llama()
    sets = {"near": ROWS[:4], "far": ROWS[4:8]}
    trainer = make_trainer(tmp_path, target, guide, **EVALUATING | {"eval_dataset": sets, "log_measures": []})
    metrics = trainer.evaluate()
    first, second, _ = (statistics.fmean(by_hand(target, guide, batch)) for batch in batches())
    assert metrics["eval_near_guidance/similarity"] == pytest.approx(first, abs=1e-5)
    assert metrics["eval_far_guidance/similarity"] == pytest.approx(second, abs=1e-5)
    assert len(own(metrics)) == 2 * 4
    assert trainer.evaluate(ROWS[:4], metric_key_prefix="x")["x_guidance/similarity"] == pytest.approx(first, abs=1e-5)
    found = trainer.predict(ROWS[4:8])
    assert found.metrics is not None
    assert found.metrics["test_guidance/similarity"] == pytest.approx(second, abs=1e-5)
    bare = [{"input_ids": row["input_ids"]} for row in ROWS[4:8]]  # without labels there is no loss
    found = trainer.predict(bare)
    assert found.metrics is not None
    assert "test_loss" not in found.metrics
    assert found.metrics["test_guidance/similarity"] == pytest.approx(second, abs=1e-5)


def test_predictions_are_those_without_it(tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        trainer = make_trainer(tmp_path, gpt2(), llama(), **EVALUATING | {"eval_similarity": on})
        trainer.compute_metrics = lambda pair: {"shape": float(pair.predictions.shape[-1])}
        found.append((trainer.predict(ROWS), trainer.evaluate()["eval_shape"]))
    assert (found[0][0].predictions == found[1][0].predictions).all()
    assert found[0][1] == found[1][1] == 17


def test_batches_that_are_too_small_are_left_out_and_if_all_are_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target, guide = gpt2(), llama()
    trainer = make_trainer(tmp_path, target, guide, **EVALUATING | {"eval_dataset": ROWS[:6]})
    expected = statistics.fmean(by_hand(target, guide, batches()[0]))
    assert trainer.evaluate()["eval_guidance/similarity"] == pytest.approx(expected, abs=1e-5)
    assert caplog.text == ""
    few = make_trainer(tmp_path, target, guide, **EVALUATING | {"per_device_eval_batch_size": 2})
    with caplog.at_level(logging.WARNING, "hf_guidance"):
        assert not own(few.evaluate())
        assert not own(few.evaluate())
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "No similarity was measured on the eval data: linear_cka needs at least 3 samples, and the batch has 1 row. "
        "Raise per_device_eval_batch_size."
    ]


def test_the_best_weights_may_be_those_of_the_highest_similarity(tmp_path: Path) -> None:
    settings = EVALUATING | {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "guidance/similarity", "greater_is_better": True}
    trainer = make_trainer(tmp_path, gpt2(), llama(), **settings, **best)
    trainer.train()
    values = [log["eval_guidance/similarity"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.state.best_metric == max(values)


class GuidedSeq2Seq(GuidanceMixin, Seq2SeqTrainer):
    pass


def test_a_trainer_that_generates_measures_one_forward_of_the_labels(tmp_path: Path) -> None:
    target, guide = t5(), llama()
    args = Seq2SeqTrainingArguments(
        str(tmp_path), predict_with_generate=True, generation_max_length=8, use_cpu=True, disable_tqdm=True
    )
    config = GuidanceConfig(
        measure="linear_cka", eval_similarity=True, target_layers=["encoder_hidden_states"], log_measures=[]
    )
    trainer = GuidedSeq2Seq(target, args, eval_dataset=ROWS[:4], guide=guide, guidance=config)
    trainer.compute_metrics = lambda pair: {}
    metrics = trainer.evaluate()
    batch = batches()[0]
    with torch.no_grad():
        ours = target.eval()(**batch).encoder_last_hidden_state
        theirs = hidden_states(guide, {"input_ids": batch["input_ids"]})[-1]
    name = "eval_guidance/similarity/encoder_hidden_states.2~hidden_states.3"
    assert metrics[name] == pytest.approx(cka(ours, theirs).item(), abs=1e-5)


def test_a_guide_is_calibrated_before_it_is_compared(tmp_path: Path) -> None:
    config = {"guide_layers": ["out"], "guide_batch_norm": "calibrated", "calibration_batches": 2}
    trainer = make_trainer(tmp_path, gpt2(), NormNet(), **EVALUATING, **config)
    first = trainer.evaluate()["eval_guidance/similarity"]
    assert trainer.guide.norm.running_mean.abs().min() > 0
    unmeasured = make_trainer(tmp_path, gpt2(), NormNet(), **EVALUATING | {"eval_similarity": False}, **config)
    assert same(trained(trainer)[0], trained(unmeasured)[0])
    again = make_trainer(tmp_path, gpt2(), trainer.guide, **EVALUATING, **config)
    assert again.evaluate()["eval_guidance/similarity"] == pytest.approx(first, abs=1e-6)


def test_means_are_weighted_by_rows() -> None:
    from accelerate import Accelerator

    from hf_guidance.loss import Watched
    from hf_guidance.schedule import Weights

    measured = SimilarityMeans("rsa")
    for rows, values in ((3, (0.5, 0.25)), (1, (0.1, 0.05))):
        similarities = {
            "rsa": dict(zip(("a~b", "c~d"), map(torch.tensor, values), strict=True)),
            "ridge": {"a~b": torch.tensor(0.0)},
        }
        measured.add(Watched({}, Weights(1.0, 1.0), similarities=similarities), rows)
    measured.add(Watched({}, Weights(1.0, 1.0), why_unguided="few: raise per_device_train_batch_size"), 5)
    assert measured.batches == 3
    assert measured.why_nothing() == "few. Raise per_device_eval_batch_size."
    assert "GuidanceMixin.prediction_step was not called" in SimilarityMeans("rsa").why_nothing()
    assert measured.over_ranks(Accelerator(cpu=True)) == pytest.approx(
        {
            "guidance/ridge/a~b": 0.0,
            "guidance/similarity": 0.3,
            "guidance/similarity/a~b": 0.4,
            "guidance/similarity/c~d": 0.2,
        }
    )


# ------------------------------------------------------------------------------------------------- on two processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each rank wrote."""
    return [torch.load(file) for file in two_processes(SCRIPT, tmp_path_factory.mktemp("two_evaluations"))]


@pytest.mark.parametrize("kind", ["local", "global"])
def test_similarities_are_reduced_over_two_processes_of_other_batch_sizes(
    ranks: list[dict[str, Any]], kind: str
) -> None:
    first, second = (rank[kind] for rank in ranks)
    assert [[len(ids) for ids in rank["saw"]] for rank in (first, second)] == [[4, 4], [4, 3]]
    compared = [*first["saw"], *second["saw"]]
    if kind == "global":
        compared = [torch.cat(pair) for pair in zip(first["saw"], second["saw"], strict=True)]
    values = [by_hand(gpt2(), llama().eval(), {"input_ids": ids}) for ids in compared]
    expected = mean_over_rows(values, [len(ids) for ids in compared])
    for rank in (first, second):
        assert [rank["metrics"][f"eval_guidance/similarity/{name}"] for name in NAMES] == pytest.approx(
            expected, abs=1e-5
        )
        mean = statistics.fmean(expected)
        assert rank["metrics"]["eval_guidance/similarity"] == pytest.approx(mean, abs=1e-5)
