"""Files of a recipe: its data told apart by content, its results never half written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_guidance.config import Json
from hf_guidance.experiments.report import Record, Report

if TYPE_CHECKING:
    from hf_guidance.experiments.matrix import Cells


def read_json(path: Path) -> Any:
    """Read a JSON object that a run has written.

    Raises:
        ValueError: If the file is damaged. The message names the folder to remove.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__}, expected names with values")
        return found
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Remove {path.parent} to run it again, and the folders of runs that used its "
            "network as their guide."
        ) from error


def write_json(path: Path, content: Json | Record | Report | Cells) -> None:
    """Write a JSON file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def identify_files(paths: Sequence[str]) -> list[dict[str, str]]:
    """Return name and digest of each file, which do not depend on the folder they are in."""
    return [{"name": Path(p).name, "sha256": hashlib.sha256(Path(p).read_bytes()).hexdigest()} for p in paths]


def identify_folder(folder: str) -> str:
    """Compute a digest of the names and sizes of all files in a folder."""
    found = sorted((str(p.relative_to(folder)), p.stat().st_size) for p in Path(folder).rglob("*") if p.is_file())
    return hashlib.sha256(repr(found).encode()).hexdigest()
