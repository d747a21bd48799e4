"""The guide's sketched features of every sample, kept in a folder, so that the guide runs over the data only once."""

from __future__ import annotations

import json
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_bytes
from huggingface_hub.utils import WeakFileLock
from torch import Tensor

from hf_guidance.config import Json
from hf_guidance.features.rows import Batch, content_of, mix

logger = logging.getLogger(__name__)

META, ROWS, SCALES, LOCK = "cache.json", "rows.bin", "scales.npz", "create.lock"
FORMAT = 2
LOOKED_AT = 64  # values of an input, evenly spread, by which a sample is recognised
FLATTEST = 2**-10  # spread of the first rows, relative to their size, below which it says nothing of the others'
OTHER = 0.25  # relative distance from what is kept at which features are of another guide, and not rounded otherwise
Features = dict[str, Tensor]


class GuideCache:
    """A file with a place for every sample: its guide features as float16, and checksums of them and of its input.

    A place counts only once the checksum of its features stands behind them, so that a run may be killed at any moment.
    Features are stored relative to the mean and spread that the first rows have, which no similarity depends on; they
    are rounded before they are first used, so that a run is the same whether they are computed or read. Those of the
    first rows are kept at once: a guide that computes others of them is another guide, though its weights are the same.

    Args:
        folder: where it is kept; several runs with the same guide, layers, sketch and data may share it.
        first: the guide's features ``(n, width)`` of the first rows, by layer.
        ids: of the first rows.
        inputs: what the guide takes of them.
        rows: samples in the dataset.
        identity: what the features depend on (guide, precision, sketch), as JSON values.
        create: whether this process may create it (one of several).

    Raises:
        ValueError: a folder that cannot be written, a full disk, ids that are none, or a cache of something else.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        first: Features,
        ids: Tensor,
        inputs: Batch,
        rows: int,
        identity: Mapping[str, Json],
        create: bool = True,
    ) -> None:
        self.folder, self.rows = Path(folder), rows
        self.widths = {name: x.shape[1] for name, x in first.items()}
        self.identity = {**identity, "layers": list(self.widths.items()), "rows": rows, "format": FORMAT}
        self.kind = np.dtype([("features", "<f2", (sum(self.widths.values()),)), ("input", "<i8"), ("check", "<u4")])
        try:
            if create and not (self.folder / META).is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                with WeakFileLock(self.folder / LOCK):  # another run may begin at the same time
                    if not (self.folder / META).is_file():
                        self._create(first)
            then = json.loads((self.folder / META).read_text(encoding="utf-8"))
            scales = np.load(self.folder / SCALES)
            self._file = np.memmap(self.folder / ROWS, self.kind, "r+", shape=(rows,)) if self._same(then) else None
        except (OSError, json.JSONDecodeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"cache_guide={str(folder)!r} cannot be used ({error}): it needs {convert_bytes(self.size)} in a "
                "folder that this process may write. Choose another folder, free the disk, or lower sketch."
            ) from error
        self._mean, self._scale = (torch.from_numpy(scales[name]) for name in ("mean", "scale"))
        self._verified = np.zeros(rows, bool)  # by this process
        self._check_first(first, ids, inputs)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self.rows * self.kind.itemsize

    def __str__(self) -> str:
        parts = f"{self.rows} samples, {len(self.widths)} layers, {sum(self.widths.values())} numbers each in float16"
        return f"{convert_bytes(self.size)} in {self.folder} ({parts})"

    def features(self, ids: Tensor, inputs: Batch, run: Callable[[Tensor], Features]) -> Features:
        """The guide's features of a batch: read, or else computed and kept.

        Args:
            ids: of the samples, ``(n,)``, whole numbers from 0 to one less than `rows`.
            inputs: what the guide takes, by which it is noticed when a sample is not what it was.
            run: the guide, on the rows of the batch that are named.

        Raises:
            ValueError: an id out of range, a sample that differs from the one stored under its id, or features that
                float16 cannot hold.
        """
        where = self._places(ids)
        seen = row_checksums(inputs)
        assert self._file is not None
        found = self._file[where]
        whole = self._whole(where, found)
        self._check_inputs(where[whole], found[whole], seen[whole])
        if not whole.all():
            missing, places = ~whole, where[~whole]  # what is kept stays as it is
            new = np.zeros(len(places), self.kind)
            features = run(torch.from_numpy(missing.nonzero()[0]).to(ids.device))
            new["features"], new["input"] = self._rounded(features, places).numpy(), seen[missing]
            self._file["features"][places], self._file["input"][places] = new["features"], new["input"]
            new["check"] = self._file["check"][places] = _checks(new)  # last: now the places count
            found[missing] = new
            self._verified[places] = True
        every = torch.from_numpy(found["features"]).to(ids.device).float()
        return dict(zip(self.widths, self._by_layer(every), strict=True))

    # ----------------------------------------------------------------------------------------------------- inside

    def _by_layer(self, every: Tensor) -> tuple[Tensor, ...]:
        return every.split(list(self.widths.values()), dim=1)

    def _places(self, ids: Tensor) -> Any:
        where = ids.cpu().numpy()
        if where.ndim != 1 or where.dtype.kind != "i" or where.min() < 0 or where.max() >= self.rows:
            raise ValueError(
                f"the sample ids of a batch are {where.tolist()[:4]} …; expected a whole number from 0 to "
                f"{self.rows - 1} for each, as dataset.add_column('id', range(len(dataset))) gives."
            )
        return where

    def _check_inputs(self, where: Any, found: Any, seen: Any) -> None:
        if (other := where[found["input"] != seen]).size:
            raise ValueError(
                f"sample {other[0]} is not what it was when the guide's features of it were stored in {self.folder}: "
                "cache_guide needs inputs that are the same in every epoch, and an id of its own for each sample. "
                "Leave augmentation out, or the cache; or choose another folder, if the preprocessing or the data have "
                "changed."
            )

    def _check_first(self, first: Features, ids: Tensor, inputs: Batch) -> None:
        """Compare what is kept of the first rows with what the guide computes of them now; keep it where nothing is."""
        where, seen = self._places(ids), row_checksums(inputs)
        assert self._file is not None
        kept = self._file[where]
        whole = self._whole(where, kept)
        self._check_inputs(where[whole], kept[whole], seen[whole])
        then, now = torch.from_numpy(kept["features"])[whole].float(), self._rounded(first, where)[whole].float()
        for name, x, y in zip(self.widths, *map(self._by_layer, (then, now)), strict=True):
            if x.square().mean() > 0.25 and not (x - y).norm() <= OTHER * x.norm():
                raise ValueError(
                    f"{self.folder} holds other features of layer {name!r} than this guide computes of the first rows "
                    f"(they differ by {(x - y).norm() / x.norm():.0%}), though its weights are the same: another "
                    "activation or option, or its images in another memory_format. Give another cache_guide folder, "
                    "or remove that one."
                )
        self.features(ids, inputs, lambda rows: {name: x[rows] for name, x in first.items()})

    def _create(self, first: Features) -> None:
        every = torch.cat([x.float() for x in first.values()], 1).cpu()
        if not every.isfinite().all():
            raise ValueError("the guide's features of the first rows are not finite: there is nothing to be kept.")
        mean = every.mean(0)
        scale = torch.cat([_scale(x).expand(x.shape[1]) for x in self._by_layer(every)])
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

    def _whole(self, where: Any, found: Any) -> Any:
        """Which places of a batch count; their checksums are looked at once in a process."""
        new = ~self._verified[where] & (found["check"] != 0)
        self._verified[where[new]] = _checks(found[new]) == found["check"][new]
        return self._verified[where]

    def _rounded(self, features: Features, where: Any) -> Tensor:
        every = torch.cat([features[name].float() for name in self.widths], 1).cpu()
        every = (every - self._mean) / self._scale
        rounded = every.half()
        if (lost := (rounded.isinf() & every.isfinite()).any(1)).any():
            raise ValueError(
                f"the guide's features of sample {where[lost.numpy()][0]} are {every[lost].abs().max():.0e} times as "
                "far from the mean as those of the first rows are, and a cache keeps them as float16, up to 65504. "
                "Shuffle the data, if their first rows are unlike the others, or train without cache_guide."
            )
        return rounded


def _scale(first: Tensor) -> Tensor:
    """What a layer's features ``(n, width)`` are divided by: their spread, unless these rows are as good as one."""
    spread, size = (first - first.mean(0)).square().mean().sqrt(), first.square().mean().sqrt()
    scale = torch.maximum(spread, FLATTEST * size)
    return torch.where(scale > 0, scale, 1.0)


def _in_words(name: str) -> str:
    return {"fingerprint": "guide weights"}.get(name, name)


def row_checksums(inputs: Batch) -> Any:
    """A number for each row of the guide's inputs ``(n, …)``, int64, from a few of the values of each."""
    rows, sums = len(content_of(inputs)), torch.zeros((), dtype=torch.int64)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim and len(value) == rows:
            content = value.reshape(rows, -1)
            looked_at = torch.linspace(0, content.shape[1] - 1, min(LOOKED_AT, content.shape[1])).long()
            some = content.index_select(1, looked_at.to(content.device))
            some = some.float().contiguous().view(torch.int32) if some.is_floating_point() else some
            places = torch.arange(some.shape[1], device=some.device) + 1 + zlib.crc32(name.encode())
            sums = sums + mix(some.long() + mix(places)).sum(1).cpu()
    return sums.numpy()


def _checks(rows: Any) -> Any:
    """A checksum of each row's features and input, never 0."""
    pairs = zip(rows["features"], rows["input"], strict=True)
    return np.array([zlib.crc32(i.tobytes(), zlib.crc32(x.tobytes())) or 1 for x, i in pairs], dtype=np.uint32)
