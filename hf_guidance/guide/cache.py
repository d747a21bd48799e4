"""Cache of the guide's sketched features of every sample, in a folder, so that the guide runs only once per sample."""

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
from hf_guidance.features.batch import Batch
from hf_guidance.features.rows import content_of, mix

logger = logging.getLogger(__name__)

META, ROWS, SCALES, LOCK = "cache.json", "rows.bin", "scales.npz", "create.lock"
FORMAT, WITHOUT_HALVES = 3, 2  # of the files; of earlier versions, whose sketches are of one part
MAX_HASHED = 64  # evenly spaced values of each input that enter a sample's checksum
MIN_SPREAD = 2**-10  # spread of the first rows, relative to their size, below which they are too alike to set a scale
MAX_ROUNDING = 0.25  # relative distance from stored features above which they are another guide's
Features = dict[str, Tensor]


class GuideCache:
    """File of guide features as float16, one record per sample, with checksums of the features and of the guide's
    input.

    A record counts only once its checksum is written, so that a run may be killed at any moment. Features are stored
    relative to the mean and spread of the first rows, on which no similarity depends. They are rounded before their
    first use, so that a run is the same whether it computes or reads them. The features of the first rows are stored at
    once. A guide that computes other features of them is refused, even if its weights are the same.

    Args:
        folder: Folder of the cache. Runs with the same guide, layers, sketch and data may share it.
        first: The guide's features `(n, width)` of the first rows, by layer.
        ids: Sample ids of the first rows, `(n,)`.
        inputs: The guide's inputs of the first rows.
        rows: Number of samples in the dataset.
        identity: JSON values that the features depend on, such as guide, precision and sketch.
        create: Whether this process may create the cache. Of several processes, one should.

    Raises:
        ValueError: If the folder cannot be written, the disk is full, an id is out of range, or the cache is damaged or
            of another guide, setting or dataset.
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
        of_data = {"layers": list(self.widths.items()), "rows": rows, "format": format_of(self.folder)}
        self.identity = {**identity, **of_data}
        self.kind = np.dtype([("features", "<f2", (sum(self.widths.values()),)), ("input", "<i8"), ("check", "<u4")])
        try:
            if create and not (self.folder / META).is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                with WeakFileLock(self.folder / LOCK):  # another run may start at the same time
                    if not (self.folder / META).is_file():
                        self._create(first)
            self._check_same(self._read(META, lambda path: dict(json.loads(path.read_text(encoding="utf-8")))))
            self._file = np.memmap(self.folder / ROWS, self.kind, "r+", shape=(rows,))
            self._mean, self._scale = self._read(SCALES, self._scales)
        except OSError as error:
            raise ValueError(
                f"cache_guide={str(folder)!r} cannot be used ({error}): it needs {convert_bytes(self.size)} in a "
                "folder that this process may write. Choose another folder, free the disk, or lower sketch."
            ) from error
        self._verified = np.zeros(rows, bool)  # records that this process has verified
        self._check_first(first, ids, inputs)

    @property
    def size(self) -> int:
        """Return the size on disk, in bytes."""
        return self.rows * self.kind.itemsize

    def __str__(self) -> str:
        parts = f"{self.rows} samples, {len(self.widths)} layers, {sum(self.widths.values())} numbers each in float16"
        return f"{convert_bytes(self.size)} in {self.folder} ({parts})"

    def features(self, ids: Tensor, inputs: Batch, run: Callable[[Tensor], Features]) -> Features:
        """Return the guide's features of a batch. Those not in the cache are computed and stored.

        Args:
            ids: Sample ids, `(n,)`, integers from 0 to `rows` − 1.
            inputs: The guide's inputs. They are compared with those of the stored features.
            run: Computes the guide's features of the given rows of the batch.

        Returns:
            Layer → features `(n, width)`, in float32.

        Raises:
            ValueError: If an id is out of range, a sample differs from the one stored under its id, or float16 cannot
                hold a feature.
        """
        where = self._places(ids)
        seen = row_checksums(inputs)
        found = self._file[where]
        complete = self._complete(where, found)
        self._check_inputs(where[complete], found[complete], seen[complete])
        if not complete.all():
            missing, places = ~complete, where[~complete]  # stored records do not change
            new = np.zeros(len(places), self.kind)
            features = run(torch.from_numpy(missing.nonzero()[0]).to(ids.device))
            new["features"], new["input"] = self._rounded(features, places).numpy(), seen[missing]
            self._file["features"][places], self._file["input"][places] = new["features"], new["input"]
            new["check"] = self._file["check"][places] = _checks(new)  # last, since it makes the records count
            found[missing] = new
            self._verified[places] = True
        every = torch.from_numpy(found["features"]).to(ids.device).float()
        return dict(zip(self.widths, self._by_layer(every), strict=True))

    # ----------------------------------------------------------------------------------------------------- inside

    def _read(self, name: str, read: Callable[[Path], Any]) -> Any:
        try:
            return read(self.folder / name)
        except (FileNotFoundError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"cache_guide={str(self.folder)!r} is damaged: its {name} cannot be read ({error}). Remove the folder "
                "to have it made anew, or name another one."
            ) from error

    def _scales(self, path: Path) -> list[Tensor]:
        width = sum(self.widths.values())
        with np.load(path) as found:
            return [torch.from_numpy(found[name].reshape(width)) for name in ("mean", "scale")]

    def _by_layer(self, every: Tensor) -> tuple[Tensor, ...]:
        return every.split(list(self.widths.values()), dim=1)

    def _places(self, ids: Tensor) -> Any:
        where = ids.cpu().numpy()
        if where.ndim != 1 or where.dtype.kind != "i" or where.min() < 0 or where.max() >= self.rows:
            raise ValueError(
                f"the sample ids of a batch are {where.tolist()[:4]} …; expected an integer from 0 to "
                f"{self.rows - 1} for each, as dataset.add_column('id', range(len(dataset))) gives."
            )
        return where

    def _check_inputs(self, where: Any, found: Any, seen: Any) -> None:
        if (other := where[found["input"] != seen]).size:
            raise ValueError(
                f"sample {other[0]} has changed since the guide's features of it were stored in {self.folder}: "
                "cache_guide needs inputs that are the same in every epoch, and a unique id for each sample. Leave "
                "augmentation or cache_guide out. If the preprocessing or the data have changed, choose another folder."
            )

    def _check_first(self, first: Features, ids: Tensor, inputs: Batch) -> None:
        """Compare the stored features of the first rows with those computed now. Store those that are missing."""
        where, seen = self._places(ids), row_checksums(inputs)
        kept = self._file[where]
        complete = self._complete(where, kept)
        self._check_inputs(where[complete], kept[complete], seen[complete])
        then, now = torch.from_numpy(kept["features"])[complete].float(), self._rounded(first, where)[complete].float()
        for name, x, y in zip(self.widths, *map(self._by_layer, (then, now)), strict=True):
            if x.square().mean() > 0.25 and not (x - y).norm() <= MAX_ROUNDING * x.norm():
                raise ValueError(
                    f"{self.folder} holds other features of layer {name!r} than this guide computes of the first rows "
                    f"(they differ by {(x - y).norm() / x.norm():.0%}), although its weights are the same: the guide "
                    "may have another activation or option, or its images another memory_format. Set cache_guide to "
                    "another folder, or remove that one."
                )
        self.features(ids, inputs, lambda rows: {name: x[rows] for name, x in first.items()})

    def _create(self, first: Features) -> None:
        every = torch.cat([x.float() for x in first.values()], 1).cpu()
        if not every.isfinite().all():
            raise ValueError(
                "the guide's features of the first rows are not finite: check the guide and the data, or leave "
                "cache_guide out."
            )
        mean = every.mean(0)
        scale = torch.cat([_scale(x).expand(x.shape[1]) for x in self._by_layer(every)])
        with open(self.folder / ROWS, "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.size)  # fail now if the disk is full
            file.truncate(self.size)
        np.savez(self.folder / SCALES, mean=mean.numpy(), scale=scale.numpy())
        partial = self.folder / f"{META}.partial"
        partial.write_text(json.dumps(self.identity, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.folder / META)

    def _check_same(self, then: Any) -> None:
        now = json.loads(json.dumps(self.identity))
        changed = [name for name in now if now[name] != then.get(name)]
        if changed:
            raise ValueError(
                f"{self.folder} holds the features of another run, with other {', '.join(map(_in_words, changed))}. "
                "Set cache_guide to another folder, or remove that one."
            )

    def _complete(self, where: Any, found: Any) -> Any:
        """Tell which records of a batch count. Each checksum is verified once per process."""
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
                "far from the mean as those of the first rows, and the cache's float16 ends at 65504. Shuffle the data "
                "if the first rows are unlike the others, or train without cache_guide."
            )
        return rounded


def format_of(folder: str | os.PathLike[str]) -> int:
    """Return the format of a cache that may be read: that of an earlier version, or else the present one."""
    try:
        found = json.loads((Path(folder) / META).read_text(encoding="utf-8")).get("format")
    except (OSError, json.JSONDecodeError, AttributeError):
        found = None
    return WITHOUT_HALVES if found == WITHOUT_HALVES else FORMAT


def _scale(first: Tensor) -> Tensor:
    """Compute the divisor of a layer's features `(n, width)`: their spread, or a floor if the rows are almost equal."""
    spread, size = (first - first.mean(0)).square().mean().sqrt(), first.square().mean().sqrt()
    scale = torch.maximum(spread, MIN_SPREAD * size)
    return torch.where(scale > 0, scale, 1.0)


def _in_words(name: str) -> str:
    return {"fingerprint": "guide weights", "autocast": "mixed precision (autocast)"}.get(name, name)


def row_checksums(inputs: Batch) -> Any:
    """Compute an int64 checksum of each row of the guide's inputs `(n, …)`, from a few values of each input."""
    rows, sums = len(content_of(inputs)), torch.zeros((), dtype=torch.int64)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim and len(value) == rows:
            content = value.reshape(rows, -1)
            hashed = torch.linspace(0, content.shape[1] - 1, min(MAX_HASHED, content.shape[1])).long()
            some = content.index_select(1, hashed.to(content.device))
            some = some.float().contiguous().view(torch.int32) if some.is_floating_point() else some
            places = torch.arange(some.shape[1], device=some.device) + 1 + zlib.crc32(name.encode())
            sums = sums + mix(some.long() + mix(places)).sum(1).cpu()
    return sums.numpy()


def _checks(rows: Any) -> Any:
    """Compute a checksum of each row's features and input, never 0."""
    pairs = zip(rows["features"], rows["input"], strict=True)
    return np.array([zlib.crc32(i.tobytes(), zlib.crc32(x.tobytes())) or 1 for x, i in pairs], dtype=np.uint32)
