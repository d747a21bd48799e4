"""The folder that a push uploads: files of the model and its card, whatever else lies in the output folder."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hf_guidance.card.settings_redaction import scrub_settings

STAGING = "_push"
CARD = "README.md"
CURVES, MAPS = "curves.png", "similarity.png"


def files_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Find the regular files in a folder and its sub-folders; no link is followed, and none is in it.

    Returns:
        Relative path → numbers that change whenever the file is written.
    """
    found: dict[str, tuple[int, ...]] = {}
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(place, name)
            with suppress(FileNotFoundError):  # another process may remove what is not the model's
                now = path.lstat()
                if stat.S_ISREG(now.st_mode):
                    stamp = (now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
                    found[path.relative_to(folder).as_posix()] = stamp
    return found


def make_empty(folder: Path) -> Path:
    """Make a folder that is empty, in place of whatever is there; where a link points to stays as it is."""
    remove(folder)
    folder.mkdir(parents=True)
    return folder


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, a file, or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def without_links(folder: Path, names: Iterable[str | Path]) -> None:
    """Remove those of the files in a folder that are links, so that writing them changes nothing elsewhere."""
    for path in (folder / name for name in names):
        if path.is_symlink():
            path.unlink()


def put(source: Path, target: Path, link: bool = True) -> None:
    """Put a file into another place at once, in place of a file or a link there.

    Args:
        link: whether both may be one file on the disk; not where either may be written to later.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        if not link:
            raise OSError("a copy is asked for")
        os.link(source, partial)
    except OSError:  # or another disk, or one without links
        shutil.copy2(source, partial)
    os.replace(partial, target)
    partial.unlink(missing_ok=True)  # replacing a file by itself does nothing


def stage(names: Iterable[str], source: Path, staged: Path) -> None:
    """Put files into a staging folder, those that are there and are no links."""
    there = files_in(source)
    for name in names:
        if name in there:
            put(source / name, staged / name)


def complete(staged: Path, output: Path) -> None:
    """Add card and figures to a staged model, and take tokens and paths of this machine out of its settings."""
    stage((CARD, CURVES, MAPS), output, staged)
    scrub_settings(staged, output)
