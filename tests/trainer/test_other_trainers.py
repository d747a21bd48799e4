"""Guidance in TRL's Trainers, by its default settings, with the real packages; and the table that users read of it."""

from __future__ import annotations

import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import two_processes
from text_trainers import CASES, CONFIG, NAMED, TRAINERS, Case, guide_of, make, model_of, rows_of
from torch import Tensor, nn
from trainers import same, trained, weights
from transformers import LlamaConfig, Trainer

from hf_guidance import GuidanceConfig, GuidanceLoss, GuidanceMixin, load_guide
from hf_guidance.features.reader import base_model_of

trainers = pytest.mark.trainers
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_trainer = pytest.mark.parametrize("case", [Case(name) for name in TRAINERS], ids=TRAINERS)
GENERATES = [Case("GRPO"), Case("RLOO")]
IN_ORDER = {"train_sampling_strategy": "sequential", "optim": "sgd", "lr_scheduler_type": "constant"}
SCRIPT = Path(__file__).parents[1] / "scripts" / "two_text_trainers.py"
PADDING_FREE: dict[str, Any] = {"padding_free": True, "max_length": None}
IN_ORDER |= {"max_grad_norm": 0.0, "max_steps": 1, "learning_rate": 0.1}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text_trainers")


def batches_with_gradients(network: nn.Module) -> list[dict[str, Tensor]]:
    """The inputs of every forward with gradients from now on, as the network receives them."""
    seen: list[dict[str, Tensor]] = []
    columns = ("input_ids", "attention_mask", "position_ids")

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and module.training:
            seen.append({name: kwargs[name] for name in columns if kwargs.get(name) is not None})

    network.register_forward_pre_hook(keep, with_kwargs=True)
    return seen


@trainers
@every_case
def test_it_trains_guided_by_the_default_settings(case: Case, folder: Path) -> None:
    trainer = make(case, folder)
    is_fused = case.trainer == "Distillation"  # the model is called by a method of the Trainer
    batches = batches_with_gradients(base_model_of(trainer.model).model if is_fused else trainer.model)
    before = weights(trainer.model)
    logs = trained(trainer)[1]
    assert not same(before, weights(trainer.model))
    assert [log["guidance/weight"] for log in logs] == [1, 1, 1]
    assert all(math.isfinite(log["guidance/loss"]) and math.isfinite(log["task/loss"]) for log in logs)
    assert all("guidance/skipped_batches" not in log for log in logs)
    assert len(batches) == 3
    target = model_of(case, folder).train()  # as it was before the first step: adapters begin with a product of zero
    loss = GuidanceLoss(target, guide_of(), GuidanceConfig())
    with loss.watch(batches[0]) as watched:
        target(**batches[0], use_cache=False)
    assert watched.loss is not None
    assert logs[0]["guidance/loss"] == pytest.approx(watched.loss.item(), rel=1e-4)


@trainers
@every_case
def test_with_weight_0_losses_and_weights_are_the_plain_trainers_bit_for_bit(case: Case, folder: Path) -> None:
    runs = []
    for options in ({"guided": False}, {"guidance": GuidanceConfig(guidance_weight=0)}):
        end, logs = trained(make(case, folder, **options))
        kept = [{name: value for name, value in log.items() if not re.search("time|per_second", name)} for log in logs]
        for log in kept:
            log.pop("task/loss", None)
        runs.append((end, kept))
    (plain, plain_logs), (ours, our_logs) = runs
    assert same(ours, plain)
    assert our_logs == plain_logs


@trainers
@every_trainer
def test_named_modules_are_guided_too(case: Case, folder: Path) -> None:
    logs = trained(make(case, folder, guidance=GuidanceConfig(**NAMED, log_measures=[])))[1]
    pairs = {f"guidance/similarity/model.layers.{i}~layers.{i}" for i in (0, 1)}
    assert all({name for name in log if name.startswith("guidance/similarity/")} == pairs for log in logs)


@trainers
@every_trainer
def test_evaluation_is_the_tasks_alone(case: Case, folder: Path) -> None:
    found = []
    for options in ({"guided": False}, {}):
        trainer = make(case, folder, per_device_eval_batch_size=8, **options)
        trainer.eval_dataset = trainer.train_dataset
        found.append({k: v for k, v in trainer.evaluate().items() if not re.search("time|per_second", k)})
    assert found[0] == found[1]
    assert "eval_loss" in found[1]


@trainers
@every_trainer
def test_it_saves_checkpoints_with_cards_and_resumes_to_the_same_bits(case: Case, tmp_path: Path) -> None:
    settings, out = {"save_strategy": "steps", "save_steps": 2}, tmp_path / "out"
    trainer = make(case, tmp_path, **settings)
    end = trained(trainer)[0]
    assert (out / "checkpoint-2" / "model.safetensors").is_file()
    trainer.create_model_card()
    assert "- hf_guidance\n" in (out / "README.md").read_text(encoding="utf-8")
    again = make(case, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert same(weights(again.model), end)


@trainers
@pytest.mark.parametrize("name", TRAINERS)
def test_no_attribute_of_ours_has_the_name_of_one_of_theirs(name: str) -> None:
    import trl

    kind = getattr(trl, f"{name}Trainer")
    theirs = set().union(*(vars(base) for base in kind.__mro__ if base.__module__.startswith("trl.")))
    for base in kind.__mro__:
        if base.__module__.startswith("trl."):
            theirs |= set(re.findall(r"self\.(\w+)(?::[^=\n]+)? = ", inspect.getsource(base)))
    ours = set().union(*(vars(base) for base in GuidanceMixin.__mro__ if base.__module__.startswith("hf_guidance.")))
    for base in GuidanceMixin.__mro__:
        if base.__module__.startswith("hf_guidance."):
            ours |= set(re.findall(r"self\.(\w+)(?::[^=\n]+)? = ", inspect.getsource(base)))
    shared = {attribute for attribute in ours & theirs if not attribute.startswith("__")}
    assert {attribute for attribute in shared if not hasattr(Trainer, attribute)} == set()


@trainers
@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "SFT"])
def test_a_guide_with_another_vocabulary_is_refused(name: str, folder: Path) -> None:
    guide = load_guide(LlamaConfig(**{**CONFIG, "vocab_size": 70}), seed=1)
    with pytest.raises(ValueError, match=r"the target's vocabulary has 64 tokens and the guide's 70"):
        make(Case(name), folder, guide=guide).train()


@trainers
@pytest.mark.parametrize("axis", ["sequence", "token"])
def test_padding_behind_documents_changes_nothing(axis: str, folder: Path) -> None:
    losses = []
    for settings in ({}, PADDING_FREE, {**PADDING_FREE, "pad_to_multiple_of": 32}):
        config = GuidanceConfig(sample_axis=axis, log_measures=[])
        losses.append(trained(make(CASES["SFT"], folder, guidance=config, **IN_ORDER, **settings))[1][0])
    found = [log["guidance/loss"] for log in losses]
    assert found == pytest.approx(found[:1] * 3, rel=1e-5)


@trainers
@pytest.mark.parametrize("case", GENERATES, ids=[case.trainer for case in GENERATES])
def test_as_many_rows_as_positions_are_no_trouble_for_named_modules(case: Case, folder: Path) -> None:
    settings = {"num_generations": 8, "max_completion_length": 4, "max_steps": 2}
    logs = trained(make(case, folder, guidance=GuidanceConfig(**NAMED, log_measures=[]), **settings))[1]
    assert [log["guidance/weight"] for log in logs] == [1, 1]


@trainers
@pytest.mark.parametrize("name", ["DPO", "Reward"])
def test_of_pairs_two_are_enough_and_one_is_too_few(name: str, folder: Path) -> None:
    case = Case(name)
    logs = trained(make(case, folder, per_device_train_batch_size=2))[1]
    assert [log["guidance/weight"] for log in logs] == [1, 1, 1]
    words = r"per_device_train_batch_size is 1, of which the data collator makes 2 samples, but \w+ needs at least"
    with pytest.raises(ValueError, match=words):
        make(case, folder, per_device_train_batch_size=1)
    config = GuidanceConfig(guide_rows=6)
    assert trained(make(case, folder, per_device_train_batch_size=3, guidance=config))[1][0]["guidance/weight"] == 1


@trainers
@pytest.mark.parametrize("case", [CASES["SFT, packed"], CASES["SFT, padding-free"]], ids=["packed", "padding-free"])
def test_documents_in_one_row_are_not_taken_for_one_sample_too_few(case: Case, folder: Path) -> None:
    batch = 1 if "packing" in case.settings else 3
    make(case, folder, per_device_train_batch_size=batch)


@trainers
@pytest.mark.parametrize("case", GENERATES, ids=[case.trainer for case in GENERATES])
@pytest.mark.parametrize(
    "settings",
    [
        {"similarity_batch": "accumulated"},
        {"sample_axis": "within"},
        {"guide_input": "prealign_noise", "prealign_steps": 1},
        {"eval_similarity": True},
        {"cache_guide": "cache", "sample_id_column": "id", "sketch": 64},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_needs_the_batches_beforehand_is_refused_where_they_are_generated(
    case: Case, folder: Path, settings: dict[str, Any]
) -> None:
    name, value = next(iter(settings.items()))
    words = rf"Guided{case.trainer}Trainer makes its batches itself, in each step, .* {name}={value!r} needs them as .*"
    with pytest.raises(ValueError, match=words + "leave it out"):
        make(case, folder, guidance=GuidanceConfig(**settings))


@trainers
@pytest.mark.parametrize("case", [CASES["SFT"], CASES["SFT, LoRA"]], ids=["SFT", "SFT, LoRA"])
def test_guidance_counts_once_whatever_the_accumulation(case: Case, folder: Path) -> None:
    rows, runs = rows_of(case, 8), []
    for steps in (1, 2, 4):
        data = type(rows).from_list(list(rows) * steps)
        trainer = make(case, folder, gradient_accumulation_steps=steps, train_dataset=data, **IN_ORDER)
        end, (log,) = trained(trainer)
        runs.append((end, {name: log[name] for name in ("loss", "task/loss", "guidance/loss", "grad_norm")}))
    for end, log in runs[1:]:
        assert log == pytest.approx(runs[0][1], rel=1e-5)
        torch.testing.assert_close(end, runs[0][0], rtol=1e-5, atol=1e-6)


@trainers
def test_the_guides_own_columns_do_not_pass_sfts_collator_so_another_vocabulary_is_refused(folder: Path) -> None:
    trainer = make(CASES["SFT"], folder, guide=load_guide(LlamaConfig(**{**CONFIG, "vocab_size": 70}), seed=1))
    row = {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "guide_input_ids": [1, 2, 3]}
    assert "guide_input_ids" not in trainer.data_collator([row, row])
    with pytest.raises(ValueError, match=r"the target's vocabulary has 64 tokens and the guide's 70"):
        trainer.train()


# ------------------------------------------------------------------------------------------------------ two processes


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of two processes wrote."""
    return [
        json.loads(file.read_text())
        for file in two_processes(SCRIPT, tmp_path_factory.mktemp("two_text_trainers"), suffix="json")
    ]


@trainers
@pytest.mark.parametrize("name", ["Seq2Seq", *TRAINERS])
def test_two_processes_train_guided_and_end_with_the_same_weights(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first["wrapper"] == "DistributedDataParallel"
    assert first["weights"] == second["weights"]
    assert [log["guidance/weight"] for log in first["logs"]] == [1, 1]
    assert [log["guidance/loss"] for log in first["logs"]] == [log["guidance/loss"] for log in second["logs"]]


# ---------------------------------------------------------------------------------------------------------- the table


TABLE = Path(__file__).parents[2] / "recipes" / "guides" / "other_trainers.md"
COLUMNS = ["Trainer", "guided", "default layers", "named modules", "padding-free", "LoRA", "two processes"]
PROOFS = {  # cell of transformers' own Trainers → the file and the name of its test
    ("Trainer", "guided"): ("trainer/test_guidance_trainer.py", "test_logged_loss_is_task_plus_weight_times_guidance"),
    ("Trainer", "default layers"): ("test_loss.py", "test_gradients_are_those_of_the_formula_written_out"),
    ("Trainer", "named modules"): ("test_loss.py", "test_explicit_pairs_compare_modules_and_hidden_states_as_named"),
    ("Trainer", "padding-free"): ("test_loss.py", "test_packed_and_padded_documents_give_the_same_loss"),
    ("Trainer", "LoRA"): ("trainer/test_guidance_trainer.py", "test_an_adapted_target_learns_in_its_adapters_only"),
    ("Trainer", "two processes"): (
        "trainer/test_processes.py",
        "test_the_step_follows_the_mean_of_the_ranks_own_gradients",
    ),
    ("Seq2SeqTrainer", "guided"): ("trainer/test_guidance_mixin.py", "test_the_mixin_guides_a_seq2seq_trainer"),
    ("Seq2SeqTrainer", "default layers"): ("trainer/test_guidance_mixin.py", "test_the_mixin_guides_a_seq2seq_trainer"),
    ("Seq2SeqTrainer", "named modules"): (
        "trainer/test_guidance_mixin.py",
        "test_a_seq2seq_trainer_takes_named_modules_and_adapters",
    ),
    ("Seq2SeqTrainer", "LoRA"): (
        "trainer/test_guidance_mixin.py",
        "test_a_seq2seq_trainer_takes_named_modules_and_adapters",
    ),
    ("Seq2SeqTrainer", "two processes"): (
        "trainer/test_other_trainers.py",
        "test_two_processes_train_guided_and_end_with_the_same_weights",
    ),
}
NO_PADDING_FREE = {"Seq2SeqTrainer": "no such setting", "DPOTrainer": "TRL pads instead"}


def table() -> dict[tuple[str, str], str]:
    """Cell by Trainer and column."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == COLUMNS
    return {(row[0], column): cell for row in cells[2:] for column, cell in zip(COLUMNS[1:], row[1:], strict=True)}


def test_each_cell_of_the_table_is_what_a_test_shows() -> None:
    expected = dict.fromkeys(PROOFS, "yes")
    for name in TRAINERS:
        own = dict.fromkeys(("guided", "default layers", "named modules", "two processes"), "yes")
        own |= {way: "yes" for way in ("padding-free", "LoRA") if f"{name}, {way}" in CASES}
        expected |= {(f"{name}Trainer", column): cell for column, cell in own.items()}
    names = ["Trainer", "Seq2SeqTrainer", *(f"{name}Trainer" for name in TRAINERS)]
    expected = {(name, column): "no such setting" for name in names for column in COLUMNS[1:]} | expected
    expected |= {(name, "padding-free"): words for name, words in NO_PADDING_FREE.items()}
    assert table() == expected


@pytest.mark.parametrize("cell", PROOFS, ids=" ".join)
def test_the_tests_behind_the_cells_exist(cell: tuple[str, str]) -> None:
    path, name = PROOFS[cell]
    assert f"\ndef {name}(" in (Path(__file__).parents[1] / path).read_text(encoding="utf-8")


@trainers
@every_trainer
def test_padding_free_is_where_the_table_says(case: Case, folder: Path) -> None:
    import trl

    said = table()[f"{case.trainer}Trainer", "padding-free"]
    has_setting = "padding_free" in getattr(trl, f"{case.trainer}Config").__dataclass_fields__
    assert has_setting == (said != "no such setting")
    if said == "TRL pads instead":
        trainer = make(case, folder, padding_free=True)
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["attention_mask"].shape == batch["input_ids"].shape
        assert len(batch["input_ids"]) == 16
