"""Writing results so that nothing is half written, and not after hours of work to find that it cannot be."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from hf_guidance.config import Json
from hf_guidance.experiments.report import Record, Report


def check_writable(folder: Path) -> None:
    """Make a folder for results, or raise ValueError before there are any."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written ({error.strerror}): name another folder.") from error


def write_json(path: Path, content: Json | Record | Report) -> None:
    """Write all of a file or nothing of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
