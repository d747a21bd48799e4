"""Errors that keep a dataset from being loaded are said, whoever raises them."""

import datasets
import pytest

from hf_guidance.tasks.splits import read_splits


def test_the_splits_of_a_folder_are_read(tmp_path):
    (tmp_path / "train.csv").write_text("text\na\nb\n")
    assert read_splits(str(tmp_path), None, streaming=False)["train"]["text"][:] == ["a", "b"]


def test_a_dataset_that_is_nowhere_and_a_configuration_it_has_not_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "./nowhere", "/no/such/folder"):
        words = (
            f"dataset '{name}' not found: it is no local folder with data .seen from {tmp_path}., and the Hub has no"
        )
        with pytest.raises(ValueError, match=words):
            read_splits(name, None, streaming=False)
    (tmp_path / "train.csv").write_text("text\na\n")
    words = (
        r"cannot be read \(ValueError: BuilderConfig 'large' not found\. .*\)\. Check its files and the name of its co"
    )
    with pytest.raises(ValueError, match=words):
        read_splits(str(tmp_path), "large", streaming=False)


def test_damaged_files_are_a_value_error(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=rf"the dataset '{tmp_path}' cannot be read \(\w+: .*\)\. Check its files"):
        read_splits(str(tmp_path), None, streaming=False)


def test_a_hub_that_cannot_be_reached_is_a_connection_error(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'me/rows' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    words = r"'me/rows' could not be loaded: Couldn't reach 'me/rows' on the Hub\. Try again later, or name a folder"
    with pytest.raises(ConnectionError, match=words):
        read_splits("me/rows", None, streaming=True)
    with pytest.raises(ValueError, match=r"dataset '\./rows' not found"):
        read_splits("./rows", None, streaming=True)
