"""Result files: checked for write access before the work, and never half written."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from hf_guidance.config import Json
from hf_guidance.experiments.report import Record, Report


def check_writable(folder: Path) -> None:
    """Make the folder for results, and raise ValueError before any work if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written ({error.strerror}): name another folder.") from error


def write_json(path: Path, content: Json | Record | Report) -> None:
    """Write a JSON file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
