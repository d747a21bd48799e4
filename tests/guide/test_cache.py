"""The guide's features are computed once and read after, and nothing else changes."""

from __future__ import annotations

import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import LENGTH, VOCABULARY, NormNet, arguments, gpt2, linear, llama, seeded, token_rows
from datasets import Dataset
from torch import Tensor

from hf_guidance import GuidanceTrainer
from hf_guidance.experiments.cost.random_rows import random_images
from hf_guidance.guide.cache import GuideCache
from hf_guidance.targets.vision import vision_target

ROWS, BATCH, SKETCH = 16, 4, 24
CACHED = {"sketch": SKETCH, "sample_id_column": "id"}


def numbered(rows: int = ROWS, seed: int = 0, ids: Any = None) -> Dataset:
    content = [{name: value.tolist() for name, value in row.items()} for row in token_rows(rows, seed=seed)]
    return Dataset.from_list(content).add_column("id", list(range(rows)) if ids is None else ids)


def trainer(folder: Path, cache: Path | None, guide: Any = None, data: Any = None, **changes: Any) -> GuidanceTrainer:
    config = {"sketch": SKETCH} if cache is None else {**CACHED, "cache_guide": str(cache)}
    config |= changes.pop("guidance", {})
    return GuidanceTrainer(
        model=gpt2(),
        guide=llama() if guide is None else guide,
        guidance=linear(**config),
        args=arguments(folder, **{"max_steps": 12, "lr_scheduler_type": "constant", **changes}),
        train_dataset=numbered() if data is None else data,
    )


def counted(guide: Any) -> list[int]:
    runs: list[int] = []
    guide.register_forward_pre_hook(lambda module, args: runs.append(1))
    return runs


def weights(run: GuidanceTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def test_the_guide_runs_in_the_first_epoch_alone_and_training_is_that_without_a_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = llama()
    runs = counted(guide)
    cached, plain = trainer(tmp_path / "a", tmp_path / "cache", guide), trainer(tmp_path / "b", None)
    cached.train()
    plain.train()
    # two looks at the first rows (what the layers are, and once more with the trainer's own batches) come before
    assert len(runs) == 1 + ROWS // BATCH
    assert "The guide's features will take" in capsys.readouterr().out
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(cached)[name], value, rtol=0, atol=2e-3)  # float16 instead of float32
    ours, theirs = ([log["guidance/loss"] for log in run.state.log_history if "loss" in log] for run in (cached, plain))
    assert ours == pytest.approx(theirs, abs=5e-3)
    cached.train()
    assert "The guide's features" not in capsys.readouterr().out  # it has been said


def test_a_guide_on_some_rows_with_a_cache_trains_as_without(tmp_path: Path) -> None:
    some = {"guidance": {"guide_rows": 3}, "learning_rate": 1e-3}  # at 1e-2 three rows amplify float16's rounding
    cached, plain = trainer(tmp_path / "a", tmp_path / "cache", **some), trainer(tmp_path / "b", None, **some)
    cached.train()
    plain.train()
    ours, theirs = ([log["guidance/loss"] for log in run.state.log_history if "loss" in log] for run in (cached, plain))
    assert ours == pytest.approx(theirs, abs=5e-3)


@pytest.mark.parametrize("settings", [{"guidance": {"guidance_every": 2}}, {"per_device_train_batch_size": 3}], ids=str)
def test_the_guide_is_shown_each_sample_once(tmp_path: Path, settings: dict[str, Any]) -> None:
    guide, rows = llama(), 0

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal rows
        rows += len(kwargs["input_ids"])

    guide.register_forward_pre_hook(count, with_kwargs=True)
    trainer(tmp_path / "a", tmp_path / "cache", guide, max_steps=80, **settings).train()
    assert rows == ROWS


def test_a_run_with_a_full_cache_is_bit_for_bit_the_one_that_filled_it(tmp_path: Path) -> None:
    first = trainer(tmp_path / "a", tmp_path / "cache")
    first.train()
    guide = llama()
    runs = counted(guide)
    second = trainer(tmp_path / "b", tmp_path / "cache", guide)
    second.train()
    assert len(runs) == 1, "but for the look at the first rows"
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


def test_places_without_their_checksum_are_computed_again(tmp_path: Path) -> None:
    first = trainer(tmp_path / "a", tmp_path / "cache")
    first.train()
    cache = first.guidance_loss.running.cache
    kind, path = cache.kind, tmp_path / "cache" / "rows.bin"
    del first, cache
    rows = np.memmap(path, kind, "r+")
    good = rows.copy()
    rows["features"][3, :5] = 7  # torn by a crash: the features are not those of the checksum
    rows["input"][2] ^= 2**40  # or that of its input is not
    rows["check"][6] = 0  # or the checksum was not reached
    rows.flush()
    guide = llama()
    runs = counted(guide)
    trainer(tmp_path / "b", tmp_path / "cache", guide).train()
    assert len(runs) == 2, "for the first rows, which 2 and 3 are among, and for the batch that 6 is in"
    assert np.array_equal(np.memmap(path, kind, "r"), good)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guide": llama(seed=5)}, "with other guide weights"),
        ({"guidance": {"guide_layers": ["hidden_states.1"]}}, "with other layers"),
        ({"guidance": {"sketch": 12}}, "with other layers, sketch|with other sketch, layers"),
        ({"data": numbered(20)}, "with other rows"),
        ({"data": numbered(seed=3)}, r"sample \d+ has changed since"),
    ],
)
def test_a_cache_of_something_else_is_an_error_that_names_it(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    trainer(tmp_path / "a", tmp_path / "cache").train()
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path / "b", tmp_path / "cache", **changes).train()


class Augmented(torch.utils.data.Dataset):
    """Rows that are others each time they are read."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(VOCABULARY, (LENGTH,))
        return {"input_ids": ids, "labels": ids, "id": index}


class ByEpoch(Augmented):
    """Rows that change from one epoch to the next, and only then."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = seeded(lambda: torch.randint(VOCABULARY, (LENGTH,)), 1000 * self.epoch + index)
        return {"input_ids": ids, "labels": ids, "id": index}


class Masked(Augmented):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "attention_mask": torch.ones(LENGTH, dtype=torch.long)}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Augmented(), r"the first rows differ when they are read twice\. Leave out augmentation or cache_guide"),
        (ByEpoch(), r"sample \d+ has changed since .* cache_guide needs inputs that are the same in every epoch"),
        (numbered(ids=list(range(100, 100 + ROWS))), r"the sample ids of a batch are \[1\d\d, .* from 0 to 15"),
        (numbered().remove_columns("id"), r"no column of sample ids 'id': add one with dataset\.add_column\('id'"),
        (numbered(2), "has 2 rows, fewer than one batch of 4"),
        (numbered().to_iterable_dataset(), "this one is a stream"),
    ],
)
def test_data_whose_samples_are_not_the_same_each_time_are_refused(tmp_path: Path, data: Any, words: str) -> None:
    run = trainer(tmp_path / "a", tmp_path / "cache", data=data)
    with pytest.raises(ValueError, match=words):
        run.train()


def test_padded_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_guidance.trainer.preparation.row_checksums", lambda inputs: np.zeros(1))
    run = trainer(tmp_path / "a", tmp_path / "cache", data=Masked())
    with pytest.raises(ValueError, match="these rows have an attention_mask or decoder"):
        run.train()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sketch": None}, "cache_guide stores a sketch .* set sketch"),
        ({"sample_id_column": None}, "sample_id_column"),
        ({"sample_axis": "token"}, "sample_axis is 'token': set sample_axis='sequence'"),
        ({"guide_input": "noise"}, "guide_input is 'noise': set guide_input='batch'"),
        ({"guide_input": "shuffled"}, "guide_input is 'shuffled': set guide_input='batch'"),
        ({"guide_batch_norm": "batch"}, "with guide_batch_norm='batch' they depend on the whole batch"),
        ({"cache_guide": None}, "sample_id_column is only for cache_guide"),
    ],
)
def test_settings_under_which_features_are_no_function_of_the_sample_are_refused(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        linear(**{**CACHED, "cache_guide": "cache", **changes})


def test_a_folder_that_cannot_be_written_and_a_full_disk_are_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"file/cache' cannot be used \(.*Not a directory.* in a folder that this process"
    ):
        trainer(tmp_path / "a", tmp_path / "file" / "cache").train()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        ValueError, match=r"No space left on device.*it needs [\d.]+ KB in a folder .* free the disk, or lower sketch"
    ):
        trainer(tmp_path / "a", tmp_path / "cache").train()
    monkeypatch.undo()
    trainer(tmp_path / "a", tmp_path / "cache").train()  # what the full disk left behind is no obstacle


def test_layers_pair_up_in_the_same_order_as_without_a_cache(tmp_path: Path) -> None:
    class Backwards(torch.nn.Module):
        """Its second layer is registered first."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = seeded(lambda: torch.nn.Embedding(VOCABULARY, 8), 1)
            self.second, self.first = (seeded(lambda: torch.nn.Linear(8, 8), seed) for seed in (2, 3))

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.second(self.first(self.embed(input_ids)).relu())

    settings = {"guidance": {"guide_layers": ["Linear"]}, "max_steps": 2}
    runs = [
        trainer(tmp_path / str(i), cache, Backwards(), **settings) for i, cache in enumerate([None, tmp_path / "c"])
    ]
    for run in runs:
        run.train()
    assert runs[0].guidance_loss.pairs == runs[1].guidance_loss.pairs
    assert [guide for _, guide in runs[0].guidance_loss.pairs] == ["second", "first"]


def test_a_cache_of_other_batch_norm_statistics_is_refused(tmp_path: Path) -> None:
    layers = {"guide_layers": ["out"]}
    trainer(tmp_path / "a", tmp_path / "cache", NormNet(), guidance=layers).train()
    calibrated = {**layers, "guide_batch_norm": "calibrated", "calibration_batches": 2}
    with pytest.raises(ValueError, match="with other guide weights"):
        trainer(tmp_path / "b", tmp_path / "cache", NormNet(), guidance=calibrated).train()


def test_a_cache_for_which_there_is_nothing_to_sketch_is_in_the_way_and_that_is_said(tmp_path: Path) -> None:
    words = r"the widest layer that is compared has \d+ features: .* In both cases remove .*/cache, which was made with"
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path / "a", tmp_path / "cache", guidance={"sketch": 1000}).train()


def test_its_size_is_what_it_says(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "cache", {"a": torch.randn(4, 10), "b": torch.randn(4, 6)}, rows=1000)
    assert (tmp_path / "cache" / "rows.bin").stat().st_size == cache.size == 1000 * (16 * 2 + 8 + 4)


def cache_of(folder: Path, first: dict[str, Tensor], inputs: Any = None, rows: int = ROWS) -> GuideCache:
    ids = torch.arange(len(next(iter(first.values()))))
    return GuideCache(folder, first, ids, {"x": ids[:, None] + 1.0} if inputs is None else inputs, rows, {})


def test_first_rows_that_are_one_say_nothing_of_the_others_spread(tmp_path: Path) -> None:
    same = numbered()
    row = same[0]
    same = same.map(lambda x: {**x, "input_ids": row["input_ids"], "labels": row["labels"]} if x["id"] < BATCH else x)
    cached, plain = (trainer(tmp_path / str(i), c, data=same) for i, c in enumerate([tmp_path / "cache", None]))
    cached.train()
    plain.train()
    ours, theirs = ([log["guidance/loss"] for log in run.state.log_history if "loss" in log] for run in (cached, plain))
    assert ours == pytest.approx(theirs, abs=5e-3)


def test_features_that_float16_cannot_hold_are_refused_and_those_that_are_not_finite_come_through(
    tmp_path: Path,
) -> None:
    first = torch.randn(4, 10)
    cache = cache_of(tmp_path / "cache", {"a": first})
    ids, inputs, other = torch.arange(4, 8), {"x": torch.randn(4, 3)}, torch.randn(4, 10)
    other[2, 3] = 1e6
    with pytest.raises(ValueError, match=r"features of sample 6 are 1e\+06 times as far .* Shuffle the data"):
        cache.features(ids, inputs, lambda rows: {"a": other[rows]})
    other[2, 3] = torch.nan
    found = cache.features(ids, inputs, lambda rows: {"a": other[rows]})["a"]
    assert found.isnan().nonzero().tolist() == [[2, 3]]
    with pytest.raises(ValueError, match="features of the first rows are not finite"):
        cache_of(tmp_path / "another", {"a": other})


@pytest.mark.parametrize("how", ["another activation", "another memory_format"])
def test_a_guide_of_the_same_weights_that_computes_other_features_is_refused(tmp_path: Path, how: str) -> None:
    def guide(changed: bool = False) -> torch.nn.Module:
        middle = torch.nn.Tanh() if changed and how == "another activation" else torch.nn.ReLU()
        layers = torch.nn.Conv2d(3, 4, 3, padding=1), middle, torch.nn.Conv2d(4, 4, 3, padding=1)
        network = seeded(lambda: torch.nn.Sequential(*layers), 1)
        for number, layer in enumerate(m for m in network if isinstance(m, torch.nn.Conv2d)):
            torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(number))
            torch.nn.init.zeros_(layer.bias)
        return network.to(memory_format=torch.channels_last) if changed and how != "another activation" else network

    images = random_images(ROWS, 8, 4).with_ids("id")

    def run(folder: str, network: torch.nn.Module) -> None:
        args = arguments(tmp_path / folder, max_steps=1)
        config = linear(**CACHED, cache_guide=str(tmp_path / "cache"), guide_layers=["Conv2d"])
        target = vision_target("deep_fcn", 8, width=32, depth=2, num_labels=4)
        GuidanceTrainer(model=target, guide=network, guidance=config, args=args, train_dataset=images).train()

    run("a", guide())
    run("b", guide())
    with pytest.raises(ValueError, match=r"holds other features of layer '.' than this guide .*though its weights are"):
        run("c", guide(changed=True))


def test_every_input_that_the_guide_takes_tells_a_sample(tmp_path: Path) -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = seeded(lambda: torch.nn.Linear(8, 32), 1)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.out(second)

    class Changing(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return ROWS

        def __getitem__(self, index: int) -> dict[str, Any]:
            row = {**token_rows(ROWS)[index], "id": index}
            return {**row, "guide_first": torch.full((4,), index), "guide_second": torch.randn(8)}

    config = {"guide_layers": ["out"]}
    with pytest.raises(ValueError, match="the first rows differ when they are read twice"):
        trainer(tmp_path / "a", tmp_path / "cache", Two(), Changing(), guidance=config).train()


def test_an_id_that_two_samples_share_is_said(tmp_path: Path) -> None:
    shared = numbered(ids=[i // 2 for i in range(ROWS)])
    with pytest.raises(ValueError, match="and a unique id for each sample"):
        trainer(tmp_path / "a", tmp_path / "cache", data=shared).train()


def test_of_two_runs_that_begin_at_once_one_creates_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    created, save = [], np.savez

    def slowly(*args: Any, **kwargs: Any) -> None:
        created.append(1)
        time.sleep(0.3)
        save(*args, **kwargs)

    monkeypatch.setattr(np, "savez", slowly)
    first = {"a": torch.randn(4, 10)}
    with ThreadPoolExecutor(2) as pool:
        caches = list(pool.map(lambda _: cache_of(tmp_path / "cache", first), range(2)))
    assert len(created) == 1
    assert torch.equal(caches[0]._scale, caches[1]._scale)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("scales.npz", b"PK\x03\x04torn"),
        ("scales.npz", b""),
        ("scales.npz", b"no archive"),
        ("scales.npz", None),
        ("cache.json", b'{"layers": [['),
        ("cache.json", b"[1, 2]"),
    ],
)
def test_a_damaged_cache_is_said_to_be_one(tmp_path: Path, name: str, content: bytes | None) -> None:
    first, folder = {"a": torch.randn(4, 10)}, tmp_path / "cache"
    cache_of(folder, first)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    words = rf"cache_guide='{folder}' is damaged: its {name} cannot be read \(.*\)\. Remove the folder to have"
    with pytest.raises(ValueError, match=words):
        cache_of(folder, first)


def test_scales_of_another_width_are_damage(tmp_path: Path) -> None:
    first = {"a": torch.randn(4, 10)}
    cache_of(tmp_path / "cache", first)
    np.savez(tmp_path / "cache" / "scales.npz", mean=np.zeros(9, "f4"), scale=np.ones(9, "f4"))
    with pytest.raises(ValueError, match=r"is damaged: its scales\.npz cannot be read \(cannot reshape"):
        cache_of(tmp_path / "cache", first)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_cache_made_with_another_mixed_precision_is_refused(tmp_path: Path, bf16: bool) -> None:
    trainer(tmp_path / "a", tmp_path / "cache", bf16=bf16).train()
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["precision"] == "torch.float32"
    trainer(tmp_path / "b", tmp_path / "cache", bf16=bf16).train()
    with pytest.raises(ValueError, match=r"with other mixed precision \(autocast\)\. Set cache_guide"):
        trainer(tmp_path / "c", tmp_path / "cache", bf16=not bf16).train()


def test_the_folder_in_a_saved_config_has_no_path(tmp_path: Path) -> None:
    linear(**CACHED, cache_guide=str(tmp_path / "deep" / "cache")).save(tmp_path)
    assert json.loads((tmp_path / "guidance_config.json").read_text())["guidance"]["cache_guide"] == "cache"
