"""Streams: the pass and row at which a run resumes, if Trainer cannot go on from there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import gpt2, llama, token_rows
from torch import Tensor
from torch.utils.data import IterableDataset
from trainers import make_trainer, same, trained

from hf_guidance.trainer.streams import pass_of

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "gradient_accumulation_steps": 2}
SAVING |= {"per_device_train_batch_size": 4}


class Finite(IterableDataset):
    """Six batches, and no length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from token_rows(24)


class Sized(Finite):
    def __len__(self) -> int:
        return 24


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(("step", "words"), [(2, None), (3, None), (4, "pass 2 over the training data, at row 8. ")])
def test_a_run_that_resumes_in_a_later_pass_over_a_finite_stream_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, guided: bool, step: int, words: str | None
) -> None:
    def trainer() -> Any:
        return make_trainer(tmp_path, gpt2(), llama() if guided else None, train_dataset=Finite(), **SAVING)

    unbroken = trained(trainer())[0]
    place = tmp_path / f"checkpoint-{step}"
    assert pass_of(place) == ((2, 3) if words else (1, 0))
    caplog.set_level(logging.WARNING)
    resumed = trained(trainer(), resume_from_checkpoint=str(place))[0]
    said = [record.getMessage() for record in caplog.records if "was written in pass" in record.getMessage()]
    if words is None:
        assert said == []
        assert same(resumed, unbroken)
    else:
        assert len(said) == 1
        assert f"checkpoint-{step} was written in {words}These data have no length, so Trainer cannot go on" in said[0]
        assert "Give the data a length (__len__), or let the stream have no end." in said[0]
        assert not all(resumed[name].equal(value) for name, value in unbroken.items())


def test_a_stream_with_a_length_goes_on_where_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def trainer() -> Any:
        return make_trainer(tmp_path, gpt2(), llama(), train_dataset=Sized(), **SAVING)

    unbroken = trained(trainer())[0]
    assert pass_of(tmp_path / "checkpoint-4") == (1, 0), "none is counted"
    assert same(trained(trainer(), resume_from_checkpoint=str(tmp_path / "checkpoint-4"))[0], unbroken)
    assert not any("was written in pass" in record.getMessage() for record in caplog.records)


def test_a_run_without_a_checkpoint_is_in_its_first_pass() -> None:
    assert pass_of(None) == (1, 0)
