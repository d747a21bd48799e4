"""Rows of images, held or streamed, decoded when they are asked for."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import datasets
import torch

from .image_decoding import ImageDecoder


class ImageRows(torch.utils.data.Dataset):
    """Rows of a dataset held on disk or in memory, decoded when they are asked for."""

    def __init__(self, rows: datasets.Dataset, decode: ImageDecoder, ids: str | None = None) -> None:
        self.rows, self.decode, self.ids = rows, decode, ids
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()  # seen by workers that outlive an epoch

    def with_seed(self, seed: int) -> ImageRows:
        """The same rows, augmented otherwise."""
        return ImageRows(self.rows, self.decode.with_seed(seed), self.ids)

    def with_ids(self, name: str) -> ImageRows:
        """The same rows, numbered in a column of that name.

        Raises:
            ValueError: the images are augmented, so that a number does not stand for one input.
        """
        if self.decode.augmentation != "none":
            raise ValueError(
                f"cache_guide needs images that are the same in every epoch, and the augmentation is "
                f"{self.decode.augmentation!r}: set --augmentation none, or leave the cache out."
            )
        return ImageRows(self.rows, self.decode, name)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader: another epoch, another augmentation."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        row = self.decode(self.rows[index], int(self._epoch), name=f"of row {index}")
        return row if row is None or self.ids is None else {**row, self.ids: index}


class ImageStream(datasets.IterableDataset):
    """An endless stream: epoch after epoch, each in an order and with augmentations of its own.

    A Trainer that resumes reads as many batches as it had, so that the stream must not end with its first epoch. Ranks
    that outnumber the files share each file row by row; a row is decoded by the rank that trains on it alone. Each
    rank's workers go round their own files: the epochs of one with fewer rows are shorter.
    """

    @classmethod
    def of(cls, rows: datasets.IterableDataset, decode: ImageDecoder, buffer: int) -> ImageStream:
        """A stream over encoded `rows`, shuffled within a buffer of so many by the decoder's seed."""
        stream = cls._around(rows.shuffle(seed=decode.seed, buffer_size=buffer), decode, (0, 1))
        stream.__dict__ |= {"source": rows, "buffer": buffer}
        return stream

    @classmethod
    def _around(cls, rows: datasets.IterableDataset, decode: ImageDecoder, part: tuple[int, int]) -> ImageStream:
        stream = cls.__new__(cls)
        stream.__dict__ = rows.__dict__ | {"decode": decode, "part": part}
        return stream

    def with_seed(self, seed: int) -> ImageStream:
        """The same rows in another order and augmented otherwise."""
        return self.of(self.source, self.decode.with_seed(seed), self.buffer)

    @property
    def column_names(self) -> None:
        """Not known to those who would drop columns of what is yet to be decoded."""
        return None

    @property
    def n_shards(self) -> int:
        """As many as there are ranks, as far as accelerate is concerned: `shard` finds a way."""
        return 2**31

    def shard(self, num_shards: int, index: int, contiguous: bool = True) -> ImageStream:
        """The `index`-th of `num_shards` parts: files where there are enough, else every `num_shards`-th row."""
        if self.num_shards < num_shards:
            return self._around(self, self.decode, (index, num_shards))
        return self._around(super().shard(num_shards, index, contiguous), self.decode, self.part)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in itertools.count():
            one_epoch = copy.copy(self)
            one_epoch._epoch = torch.tensor(epoch)  # the shared one would be moved by all workers at once
            rows = _readable(super(ImageStream, one_epoch).__iter__())
            read = good = 0
            for row in itertools.islice(rows, self.part[0], None, self.part[1]):
                decoded = self.decode(row, epoch, name=f"number {read} of epoch {epoch}")
                read += 1
                if decoded is not None:
                    good += 1
                    yield decoded
            if read and not good:
                raise ValueError(f"none of the {read} images of an epoch could be decoded; look at the data.")
            if not read:
                return  # a worker without a file


def _readable(rows: Iterator[Any]) -> Iterator[Any]:
    """The rows; what breaks off reading them, after the retries of `datasets`, as a ConnectionError."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise ConnectionError(
                f"The data could not be read any further ({type(error).__name__}: {error}). Retries: "
                "datasets.config.STREAMING_READ_MAX_RETRIES, STREAMING_READ_RETRY_INTERVAL seconds apart."
            ) from error
        yield row
