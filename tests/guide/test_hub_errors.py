"""Faults of the Hub are said to be its own, with what to do; faults of a source are not taken for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from builders import gpt2
from hub import Hub
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from hf_guidance.guide.hub_errors import hub_fault, one_line

LOADING = """
import json, sys, time
time.sleep = lambda seconds: None  # between retries
from hf_guidance import load_guide, load_guide_of
said = {}
for name in sys.argv[1:]:
    for load in (load_guide, load_guide_of):
        try:
            load(name)
        except ValueError as error:
            said[f"{load.__name__} {name}"] = str(error)
print("RESULT" + json.dumps(said))
"""
FAULTS: dict[str, tuple[Any, str]] = {
    "me/401": (401, "the Hub answered 401 Unauthorized: it does not accept the token: log in anew (`hf auth login`)"),
    "me/403": (403, "the Hub answered 403 Forbidden: this user may not read it: log in as one who may"),
    "me/429": (429, "the Hub answered 429 Too Many Requests: these are too many requests. Wait some minutes"),
    "me/500": (500, "the Hub answered 500 Internal Server Error: try again later. With HF_HUB_OFFLINE=1"),
    "me/down": ("down", "cannot be reached (Server disconnected"),
    "me/gated": (None, "the Hub gives access on request: ask for it at http://127.0.0.1"),
    "me/private": (None, "it is no folder here, and no repository that this user may read. For a private one log in"),
    "me/nothing": (None, "it is no folder here, and no repository that this user may read"),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Load from repositories of a Hub that each have their fault; the words of every error."""
    folder = tmp_path_factory.mktemp("faults")
    gpt2().save_pretrained(folder / "good")
    good = {path.name: path.read_bytes() for path in (folder / "good").iterdir()}

    def fault(method: str, path: str) -> Any:
        return next((kind for name, (kind, _) in FAULTS.items() if path.startswith(f"/{name}/")), None)

    with Hub(folder / "hub", gated=["model/me/gated"], fault=fault) as hub:
        for name in {*FAULTS, "me/cut", "me/plain"} - {"me/nothing"}:
            hub.store.add(f"model/{name}", good)
        hub.store.add("model/me/cut", {"model.safetensors": good["model.safetensors"][:1000]})
        hub.store.repos["model/me/private"]["private"] = True
        environment = os.environ | hub.environment(folder / "home", token=False)
        environment.pop("HF_TOKEN", None)
        command = [sys.executable, "-c", LOADING, *FAULTS, "me/cut", "me/plain"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert "RESULT" in done.stdout, done.stderr[-3000:]
        yield json.loads(done.stdout.split("RESULT")[1])


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_hub_answers_is_said_with_a_remedy(name: str, said: dict[str, str]) -> None:
    words = FAULTS[name][1]
    assert said[f"load_guide {name}"].startswith(f"Cannot load guide '{name}': ")
    assert said[f"load_guide_of {name}"].startswith(f"Cannot read the guidance_config.json of {name}: ")
    assert all(words in said[f"{load} {name}"] for load in ("load_guide", "load_guide_of"))
    assert "not a target" not in said[f"load_guide_of {name}"]


def test_a_fault_of_the_repository_is_not_taken_for_one_of_the_hub(said: dict[str, str]) -> None:
    assert "model.safetensors is damaged or incomplete" in said["load_guide me/cut"]
    assert "load_guide me/plain" not in said, "it loads"
    assert said["load_guide_of me/plain"].startswith("me/plain has no guidance_config.json: it is not a target that")


def test_without_the_hub_it_is_said_that_it_was_not_asked() -> None:
    for cause in (OfflineModeIsEnabled("offline"), None):
        error = LocalEntryNotFoundError("not in the cache")
        error.__cause__ = cause
        words = hub_fault("me/net", error)
        assert words
        assert words.startswith("it is no folder here, and not among what this machine has loaded from the Hub before")
        assert "unset HF_HUB_OFFLINE" in words


def test_errors_of_other_kinds_are_none_of_the_hubs() -> None:
    assert hub_fault("me/net", ValueError("no")) is None
    assert hub_fault("me/net", FileNotFoundError("no")) is None


def test_an_error_is_told_on_one_line() -> None:
    assert one_line(ValueError("a\n  b.")) == "a b"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("word " * 99))) <= 300
