"""Maps of all layers before a run that is pushed: made of its rows, without moving anything of the training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import gpt2, llama, token_rows
from torch.utils.data import Dataset, IterableDataset
from trainers import make_trainer, same, weights
from transformers import Trainer

from hf_guidance.trainer.layer_maps import KeptMap


class Augmented(Dataset):  # type: ignore[type-arg]
    """Rows that draw from every source of randomness whenever one is read."""

    def __init__(self) -> None:
        self.rows = token_rows()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        turn = random.randrange(5) + np.random.randint(5) + int(torch.randint(5, ()))
        return {name: torch.as_tensor(value).roll(turn) for name, value in self.rows[place].items()}


class Counting:
    """A collator with a counter and two generators of its own."""

    def __init__(self) -> None:
        self.calls, self.numbers, self.arrays = 0, torch.Generator().manual_seed(3), np.random.default_rng(4)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        self.calls += 1
        turn = self.calls + int(torch.randint(5, (), generator=self.numbers)) + int(self.arrays.integers(5))
        return {name: torch.stack([torch.as_tensor(row[name]).roll(turn) for row in rows]) for name in rows[0]}


class Once(IterableDataset):  # type: ignore[type-arg]
    """A stream that cannot be begun anew."""

    def __init__(self) -> None:
        self.rows = iter([row for _ in range(4) for row in token_rows()])

    def __iter__(self) -> Any:
        return self.rows


@pytest.fixture
def unpublished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a Hub."""
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr(Trainer, "push_to_hub", lambda *_, **__: None)


def run(folder: Path, push: bool, rows: Any, **options: Any) -> Any:
    options = {"max_steps": 3, "save_strategy": "no", "push_to_hub": push, "hub_model_id": "me/net"} | options
    options = {"eval_dataset": token_rows()} | options
    own = make_trainer(folder, gpt2(dropout=0.3), llama(), train_dataset=rows, **options)
    own.train()
    return own


@pytest.mark.usefixtures("unpublished")
def test_a_run_that_is_pushed_trains_as_one_that_is_not(tmp_path: Path) -> None:
    made = [
        run(tmp_path / str(push), push, Augmented(), eval_dataset=Augmented(), data_collator=Counting())
        for push in (True, False)
    ]
    pushed, other = made
    assert same(weights(pushed.model), weights(other.model))
    assert pushed.layer_maps.maps.keys() == {"before"}
    assert other.layer_maps is None
    assert pushed.data_collator.calls == other.data_collator.calls > 0


@pytest.mark.usefixtures("unpublished")
def test_the_first_batch_of_a_stream_is_trained_on_and_not_looked_at(tmp_path: Path) -> None:
    rows = Once()
    own = run(tmp_path, True, rows, eval_dataset=None)
    assert own.layer_maps is None
    read = 4 * len(token_rows()) - len(list(rows.rows))
    assert read <= 4 * own.args.per_device_train_batch_size  # three batches, and the one that is fetched ahead


@pytest.mark.usefixtures("unpublished")
def test_rows_to_validate_with_are_looked_at_rather_and_those_of_no_batch_are_not(tmp_path: Path) -> None:
    held_out = [{name: value.flip(0) for name, value in row.items()} for row in token_rows()]
    own = run(tmp_path / "a", True, token_rows(), eval_dataset=held_out)
    assert torch.equal(own.layer_maps.batch["input_ids"][0], torch.as_tensor(held_out[0]["input_ids"]))
    assert run(tmp_path / "b", True, token_rows(), eval_dataset=held_out[:2]).layer_maps is None
    own = run(tmp_path / "c", True, token_rows(), eval_dataset={"one": held_out, "two": token_rows()})
    assert torch.equal(own.layer_maps.batch["input_ids"][0], torch.as_tensor(held_out[0]["input_ids"]))
    assert run(tmp_path / "d", True, token_rows(), eval_dataset=Once()).layer_maps is None


@pytest.mark.usefixtures("unpublished")
def test_a_run_that_goes_on_has_the_map_from_before_its_first_step(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_model_id": "me/net"}
    first = run(tmp_path, True, token_rows(), **{**saving, "max_steps": 2})
    torch.manual_seed(99)  # another target, until the checkpoint is loaded
    both = {"train_dataset": token_rows(), "eval_dataset": token_rows()}
    own = make_trainer(tmp_path, gpt2(seed=9), llama(), **both, **saving, max_steps=3)
    own.train(resume_from_checkpoint=True)
    own.create_model_card()
    assert own.layer_maps.maps["before"] == first.layer_maps.maps["before"]
    assert own.layer_maps.maps.keys() == {"before", "after"}
    assert (tmp_path / "similarity.png").is_file()


@pytest.mark.usefixtures("unpublished")
def test_a_run_that_began_without_a_map_has_none_later_whatever_lies_in_the_folder(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    run(tmp_path, False, token_rows(), **saving, max_steps=2)
    (tmp_path / "similarity.png").write_text("of another run")
    both = {"train_dataset": token_rows(), "eval_dataset": token_rows(), "hub_model_id": "me/net"}
    own = make_trainer(tmp_path, gpt2(), llama(), **both, **saving, push_to_hub=True, max_steps=3)
    own.train(resume_from_checkpoint=True)
    assert next(cb for cb in own.callback_handler.callbacks if isinstance(cb, KeptMap)).before is None
    own.create_model_card()
    assert "similarity.png" not in (tmp_path / "README.md").read_text()


@pytest.mark.usefixtures("unpublished")
def test_what_cannot_be_looked_at_is_said_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("too large to copy")

    monkeypatch.setattr("hf_guidance.trainer.layer_maps.similarity_map", fail)
    own = run(tmp_path, True, token_rows())
    assert own.state.global_step == 3
    assert "similarities of all layers could not be computed; training begins without them" in caplog.text
    own.create_model_card()
    assert "similarity.png" not in (tmp_path / "README.md").read_text()
