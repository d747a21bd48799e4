"""Settings of every test run, and a Hub without a network."""

import gc
import os
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

# as in the processes that accelerate starts; networks this small are slower on more, in the processes of tests too
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)

PROCESSES = re.compile(r"\bsubprocess\b|\blaunching\b|\"scripts\"")  # the ways by which tests start them


@cache
def starts_processes(path: Path) -> bool:
    return bool(PROCESSES.search(path.read_text(encoding="utf-8")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that start processes: they are the longest, and none should be left for the end."""
    items.sort(key=lambda item: not starts_processes(item.path))


def pytest_collection_finish() -> None:
    """Exempt all imported modules from garbage collection, which takes a Trainer half a second at every start."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def uploads(monkeypatch):
    """Uploads to a Hub that takes all but the commit called `fail`: its title, and content by name."""
    from huggingface_hub import HfApi

    from hf_guidance.trainer.staging import files_in

    seen = []

    def upload(self, folder_path, **options):
        if options["commit_message"] == "fail":
            raise OSError("no Hub today")
        contents = {name: (folder_path / name).read_bytes() for name in files_in(folder_path)}
        seen.append((options["commit_message"], contents))
        return SimpleNamespace(repo_url="https://hub.test/me/net")

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "auth_check", lambda *_, **__: None)
    return seen
