"""Settings of every test run, and a Hub without a network."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's products as in the processes that accelerate starts


from types import SimpleNamespace

import pytest
import torch

torch.set_num_threads(1)  # networks this small are slower on more


@pytest.fixture
def uploads(monkeypatch):
    """What is uploaded to a Hub that takes all but the commit called `fail`: its title, and content by name."""
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
