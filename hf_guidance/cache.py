"""The guide's sketched features of every sample, kept in a folder, so that the guide runs over the data only once."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_bytes
from torch import Tensor

from hf_guidance.batches import content_of, mix

logger = logging.getLogger(__name__)

META, ROWS, SCALES = "cache.json", "rows.bin", "scales.npz"
LOOKED_AT = 64  # values of an input, evenly spread, by which a sample is recognised
Features = dict[str, Tensor]


class GuideCache:
    """A file with a place for every sample: its guide features as float16, and checksums of them and of its input.

    A place counts only once the checksum of its features stands behind them, so that a run may be killed at any moment.
    Features are stored relative to the mean and spread that the first rows have, which no similarity depends on; they
    are rounded before they are first used, so that a run is the same whether they are computed or read.

    Args:
        folder: where it is kept; several runs with the same guide, layers, sketch and data may share it.
        first: the guide's features ``(n, width)`` of the first rows, by layer.
        rows: samples in the dataset.
        identity: what the features depend on (guide, precision, sketch), as JSON values.
        create: whether this process may create it (one of several).

    Raises:
        ValueError: a folder that cannot be written, a full disk, or a cache of something else.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        first: Features,
        rows: int,
        identity: Mapping[str, Any],
        create: bool = True,
    ) -> None:
        self.folder, self.rows = Path(folder), rows
        self.widths = {name: x.shape[1] for name, x in first.items()}
        self.identity = {**identity, "layers": list(self.widths.items()), "rows": rows}
        self.kind = np.dtype([("features", "<f2", (sum(self.widths.values()),)), ("input", "<i8"), ("check", "<u4")])
        try:
            if create and not (self.folder / META).is_file():
                self._create(first)
            then = json.loads((self.folder / META).read_text(encoding="utf-8"))
            scales = np.load(self.folder / SCALES)
            self._file = np.memmap(self.folder / ROWS, self.kind, "r+", shape=(rows,)) if self._same(then) else None
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"cache_guide={str(folder)!r} cannot be used ({error}): it needs {convert_bytes(self.size)} in a "
                "folder that this process may write. Choose another folder, free the disk, or lower sketch."
            ) from error
        self._mean, self._scale = (torch.from_numpy(scales[name]) for name in ("mean", "scale"))
        self._verified = np.zeros(rows, bool)  # by this process

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self.rows * self.kind.itemsize

    def __str__(self) -> str:
        parts = f"{self.rows} samples, {len(self.widths)} layers, {sum(self.widths.values())} numbers each in float16"
        return f"{convert_bytes(self.size)} in {self.folder} ({parts})"

    def features(self, ids: Tensor, inputs: Mapping[str, Any], run: Callable[[], Features]) -> Features:
        """The guide's features of a batch: read, or else computed by `run` and kept.

        Args:
            ids: of the samples, ``(n,)``, whole numbers from 0 to one less than `rows`.
            inputs: the guide's, by which it is noticed when a sample is not what it was.

        Raises:
            ValueError: an id out of range, or a sample that differs from the one stored under its id.
        """
        where = ids.cpu().numpy()
        if where.ndim != 1 or where.dtype.kind != "i" or where.min() < 0 or where.max() >= self.rows:
            raise ValueError(
                f"the sample ids of a batch are {where.tolist()[:4]} …; expected a whole number from 0 to "
                f"{self.rows - 1} for each, as dataset.add_column('id', range(len(dataset))) gives."
            )
        seen = row_checksums(inputs)
        assert self._file is not None
        found = self._file[where]
        if not self._whole(where, found):
            new = self._rounded(run())
            found = np.zeros(len(where), self.kind)
            found["features"], found["input"] = new.numpy(), seen
            self._file["features"][where], self._file["input"][where] = found["features"], seen
            self._file["check"][where] = _checks(found)  # last: now the places count
            self._verified[where] = True
        elif (other := where[found["input"] != seen]).size:
            raise ValueError(
                f"sample {other[0]} is not what it was when the guide's features of it were stored in {self.folder}: "
                "cache_guide needs inputs that are the same in every epoch. Leave augmentation out, or the cache; or "
                "choose another folder, if the preprocessing or the data have changed."
            )
        every = torch.from_numpy(found["features"]).to(ids.device).float()
        return dict(zip(self.widths, every.split(list(self.widths.values()), dim=1), strict=True))

    # ----------------------------------------------------------------------------------------------------- inside

    def _create(self, first: Features) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        every = torch.cat([x.float() for x in first.values()], 1).cpu()
        mean = every.mean(0)
        spread = [(x - x.mean(0)).square().mean().sqrt() for x in every.split(list(self.widths.values()), dim=1)]
        scale = torch.cat([s.clamp(min=1e-30).expand(w) for s, w in zip(spread, self.widths.values(), strict=True)])
        with open(self.folder / ROWS, "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.size)  # a full disk shows now
            file.truncate(self.size)
        np.savez(self.folder / SCALES, mean=mean.numpy(), scale=scale.numpy())
        partial = self.folder / f"{META}.partial"
        partial.write_text(json.dumps(self.identity, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.folder / META)

    def _same(self, then: dict[str, Any]) -> bool:
        now = json.loads(json.dumps(self.identity))
        changed = [name for name in now if now[name] != then.get(name)]
        if changed:
            raise ValueError(
                f"{self.folder} holds the features of another run, with other {', '.join(map(_in_words, changed))}. "
                "Give another cache_guide folder, or remove that one."
            )
        return True

    def _whole(self, where: Any, found: Any) -> bool:
        """Whether all places of a batch count; their checksums are looked at once in a process."""
        if not found["check"].all():
            return False
        new = ~self._verified[where]
        if new.any():
            good = _checks(found[new]) == found["check"][new]
            self._verified[where[new][good]] = True
            return bool(good.all())
        return True

    def _rounded(self, features: Features) -> Tensor:
        every = torch.cat([features[name].float() for name in self.widths], 1).cpu()
        limit = torch.finfo(torch.float16).max
        return ((every - self._mean) / self._scale).clamp(-limit, limit).half()


def _in_words(name: str) -> str:
    return {"fingerprint": "guide weights"}.get(name, name)


def row_checksums(inputs: Mapping[str, Any]) -> Any:
    """A number for each row of the guide's inputs ``(n, …)``, int64, from a few of its values."""
    content = content_of(inputs).flatten(1)
    some = content[:, torch.linspace(0, content.shape[1] - 1, min(LOOKED_AT, content.shape[1])).long()]
    some = some.float().contiguous().view(torch.int32) if some.is_floating_point() else some
    return mix(some.long() + mix(torch.arange(some.shape[1], device=some.device) + 1)).sum(1).cpu().numpy()


def _checks(rows: Any) -> Any:
    """A checksum of each row's features and input, never 0."""
    pairs = zip(rows["features"], rows["input"], strict=True)
    return np.array([zlib.crc32(x.tobytes(), int(i) & 0xFFFFFFFF) or 1 for x, i in pairs], dtype=np.uint32)
