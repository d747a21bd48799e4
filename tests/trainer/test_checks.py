"""Checks, before anything is trained, that machine and guidance can do what a run asks for."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import arguments, gpt2, linear, llama, token_rows
from torch import Tensor
from torch.utils.data import IterableDataset
from trainers import make_trainer, trained
from transformers import default_data_collator

from hf_guidance import GuidanceTrainer
from hf_guidance.guide.freezing import check_types
from hf_guidance.trainer import checks
from hf_guidance.trainer.checks import (
    check_output,
    check_settings,
    check_takes_batches,
    check_writable,
    rows_of_a_process,
    samples_of_first_batch,
    splits_batches,
)


def test_a_split_batch_is_shared_evenly_or_refused() -> None:
    def args(rows: int, split: bool) -> SimpleNamespace:
        config = SimpleNamespace(split_batches=split)
        return SimpleNamespace(per_device_train_batch_size=rows, world_size=4, accelerator_config=config)

    assert (rows_of_a_process(args(8, False)), rows_of_a_process(args(8, True))) == (8, 2)
    assert not splits_batches(args(8, False))
    with pytest.raises(ValueError, match=r"split_batches gives each of the 4 processes its part .* multiple of 4"):
        rows_of_a_process(args(6, True))


@pytest.mark.parametrize(
    ("settings", "guidance", "words"),
    [
        ({"per_device_train_batch_size": 2}, {}, "per_device_train_batch_size is 2, but linear_cka needs at least 3"),
        ({}, {"guidance_warmup_steps": 4}, "guidance_warmup_steps is 4, but the run has 3 optimizer steps: lower"),
        ({"auto_find_batch_size": True}, {}, "auto_find_batch_size changes the batch size"),
        ({}, {"similarity_batch": "accumulated"}, "gradient_accumulation_steps is 1. Set it to 2 or more"),
    ],
)
def test_settings_that_guidance_cannot_do_with_are_refused(settings, guidance, words, tmp_path) -> None:
    with pytest.raises(ValueError, match=words):
        check_settings(arguments(tmp_path, **settings), linear(**guidance))


def test_one_config_with_a_global_batch_serves_one_process_too(tmp_path, monkeypatch) -> None:
    args = arguments(tmp_path)
    check_settings(args, linear(similarity_batch="global"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but this one trains in a world of 1"):
        check_settings(args, linear(similarity_batch="global"))


def test_a_warm_up_is_not_looked_at_without_guidance_or_a_known_length(tmp_path) -> None:
    check_settings(arguments(tmp_path), linear(guidance_warmup_steps=4, guidance_weight=0.0, measure="rsa"))
    check_settings(arguments(tmp_path, max_steps=-1), linear(guidance_warmup_steps=4, measure="linear_cka"))


def test_tokens_need_no_rows_and_accumulation_makes_up_for_few(tmp_path) -> None:
    check_settings(arguments(tmp_path, per_device_train_batch_size=1), linear(sample_axis="token"))
    few = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    check_settings(few, linear(similarity_batch="accumulated"))


def test_a_guide_and_a_config_that_are_none_are_named() -> None:
    with pytest.raises(ValueError, match=r"guide is 'gpt2'; expected a network: use load_guide\('gpt2'\)"):
        check_types("gpt2", None)
    with pytest.raises(ValueError, match="guidance is a dict; expected a GuidanceConfig"):
        check_types(gpt2(), {"measure": "rsa"})
    with pytest.raises(ValueError, match=r"guidance_weight is 1\.0, but there is no guide"):
        check_types(None, linear())
    check_types(llama(), None)
    check_types(None, linear(guidance_weight=0.0))


class Pairs:
    """A collator that makes two rows of each example."""

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = default_data_collator(rows)
        return {name: torch.cat([value, value]) for name, value in batch.items()}


class Packing:
    """A collator that makes one row of all examples."""

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = torch.cat([row["input_ids"] for row in rows])[None]
        positions = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None]
        return {"input_ids": ids, "labels": ids, "position_ids": positions}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        raise AssertionError("a stream is not read to count its rows")


def test_of_pairs_two_rows_of_an_example_are_two_samples(tmp_path) -> None:
    options = {"data_collator": Pairs(), "per_device_train_batch_size": 2}
    trainer = make_trainer(tmp_path, gpt2(), llama(), **options)
    assert samples_of_first_batch(trainer) == 4
    assert [log["guidance/weight"] for log in trained(trainer)[1]] == [1, 1, 1]
    make_trainer(tmp_path, gpt2(), llama(), **options, guide_rows=4)
    with pytest.raises(ValueError, match="guide_rows is 5, but a batch has 4 rows"):
        make_trainer(tmp_path, gpt2(), llama(), **options, guide_rows=5)
    words = (
        "per_device_train_batch_size is 1, of which the data collator makes 2 samples, but linear_cka needs at least 3"
    )
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, gpt2(), llama(), **{**options, "per_device_train_batch_size": 1})


@pytest.mark.parametrize("data", [{"data_collator": Packing()}, {"data_collator": Pairs(), "train_dataset": Stream()}])
def test_where_the_number_of_samples_is_unknown_nothing_is_refused(tmp_path, data) -> None:
    trainer = make_trainer(tmp_path, gpt2(), llama(), per_device_train_batch_size=2, **data)
    assert samples_of_first_batch(trainer) is None


class Generating(GuidanceTrainer):
    """A Trainer that makes its batches in the step."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        return super()._prepare_inputs(inputs)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sample_axis": "within", "eval_similarity": True}, "sample_axis='within' and eval_similarity=True needs"),
        ({"similarity_batch": "accumulated"}, "similarity_batch='accumulated' needs"),
        ({"guide_input": "prealign_noise", "prealign_steps": 1}, "guide_input='prealign_noise' needs"),
        ({"guide_batch_norm": "calibrated"}, "guide_batch_norm='calibrated' needs"),
        ({"cache_guide": "x", "sample_id_column": "id", "sketch": 64}, "cache_guide='x' needs"),
    ],
)
def test_what_needs_batches_beforehand_is_refused_in_a_trainer_that_makes_them(tmp_path, settings, words) -> None:
    with pytest.raises(
        ValueError, match=f"Generating makes its batches itself, in each step, .*; {words} them as .*out"
    ):
        Generating(gpt2(), arguments(tmp_path), train_dataset=[], guide=llama(), guidance=linear(**settings))
    check_takes_batches("Generating", linear())


def test_a_folder_that_can_be_neither_written_nor_made_is_an_error_at_construction(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    words = r"output_dir .*file/out cannot be written \(Not a directory\): name another folder"
    with pytest.raises(ValueError, match="^--" + words):
        check_writable(tmp_path / "file" / "out", "--output_dir")
    for save in ("steps", "no"):
        args = arguments(tmp_path / "file" / "out", save_strategy=save)
        with pytest.raises(ValueError, match="^" + words):
            GuidanceTrainer(gpt2(), args, train_dataset=token_rows(), guide=llama())


def test_a_run_that_saves_nothing_needs_no_folder_to_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checks.tempfile, "TemporaryFile", refuse)
    check_output(arguments(tmp_path, save_strategy="no"))
    with pytest.raises(ValueError, match=r"output_dir .* cannot be written \(Permission denied\)"):
        check_output(arguments(tmp_path, save_strategy="steps"))


def test_more_rows_for_the_guide_than_the_data_have_are_an_error(tmp_path: Path) -> None:
    options: dict[str, Any] = {"per_device_train_batch_size": 8, "train_dataset": token_rows(5)}
    make_trainer(tmp_path, gpt2(), llama(), **options, guide_rows=5)
    with pytest.raises(ValueError, match=r"guide_rows is 6, but the training data have 5 rows: lower it, or leave it"):
        make_trainer(tmp_path, gpt2(), llama(), **options, guide_rows=6)


@pytest.mark.parametrize("name", ["eval_guidance/similarity", "guidance/similarity"])
def test_a_similarity_as_the_best_metric_has_to_be_measured(tmp_path: Path, name: str) -> None:
    make_trainer(tmp_path, gpt2(), llama(), metric_for_best_model=name, eval_similarity=True)
    with pytest.raises(ValueError, match=r"metric_for_best_model is '.*similarity', but .* with eval_similarity=True"):
        make_trainer(tmp_path, gpt2(), llama(), metric_for_best_model=name)
