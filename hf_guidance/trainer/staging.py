"""The folder that a push uploads: files of the model and its card, but nothing else from the output folder."""

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
    """Find the regular files in a folder and its sub-folders, without links.

    Returns:
        Relative path → numbers that change whenever the file is written.
    """
    found: dict[str, tuple[int, ...]] = {}
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(place, name)
            with suppress(FileNotFoundError):  # another process may remove other files meanwhile
                now = path.lstat()
                if stat.S_ISREG(now.st_mode):
                    stamp = (now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
                    found[path.relative_to(folder).as_posix()] = stamp
    return found


def make_empty(folder: Path) -> Path:
    """Make an empty folder in place of whatever is there; the destination of a link is not changed."""
    remove(folder)
    folder.mkdir(parents=True)
    return folder


def remove(path: Path) -> None:
    """Remove a folder with its content, a file, or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def without_links(folder: Path, names: Iterable[str | Path]) -> None:
    """Remove those files that are links, so that writing them changes nothing elsewhere."""
    for path in (folder / name for name in names):
        if path.is_symlink():
            path.unlink()


def put(source: Path, target: Path, link: bool = True) -> None:
    """Put a file into another place atomically, replacing a file or link there.

    Args:
        source: The file.
        target: Its new path.
        link: Whether both may share one file on disk. Use False if either may be written to later.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        if not link:
            raise OSError("a copy is asked for")
        os.link(source, partial)
    except OSError:  # also on another disk, or one without links
        shutil.copy2(source, partial)
    os.replace(partial, target)
    partial.unlink(missing_ok=True)  # os.replace does nothing if both are the same file


def stage(names: Iterable[str], source: Path, staged: Path) -> None:
    """Put the named files into a staging folder, if they exist and are not links."""
    there = files_in(source)
    for name in names:
        if name in there:
            put(source / name, staged / name)


def complete(staged: Path, output: Path, names: Iterable[str] = (CARD, CURVES, MAPS)) -> None:
    """Add card and figures to a staged model, and remove tokens and local paths from its settings."""
    stage(names, output, staged)
    scrub_settings(staged, output)
