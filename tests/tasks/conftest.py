"""A small ImageNet that the tests of images share, and no pauses of `datasets`."""

import datasets
import pytest
from images import imagenet_files, write


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # 5 s after every stream
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory):
    return write(tmp_path_factory.mktemp("imagenet"), imagenet_files())
