"""Rows of images, from a dataset or a stream, decoded on access."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import datasets
import torch

from .image_decoding import ImageDecoder


class ImageRows(torch.utils.data.Dataset):
    """Rows of a dataset on disk or in memory, decoded on access."""

    def __init__(self, rows: datasets.Dataset, decode: ImageDecoder, ids: str | None = None) -> None:
        self.rows, self.decode, self.ids = rows, decode, ids
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()  # shared with persistent workers

    def with_seed(self, seed: int) -> ImageRows:
        """Return the same rows with another seed of the augmentation."""
        return ImageRows(self.rows, self.decode.with_seed(seed), self.ids)

    def with_ids(self, name: str) -> ImageRows:
        """Return the same rows with a column of ids.

        Raises:
            ValueError: If the images are augmented, so that an id does not identify one input.
        """
        if self.decode.augmentation != "none":
            raise ValueError(
                f"cache_guide needs images that are the same in every epoch, but augmentation is "
                f"{self.decode.augmentation!r}: set augmentation='none', or leave cache_guide out."
            )
        return ImageRows(self.rows, self.decode, name)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which changes the augmentation. The loader of accelerate calls this."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        row = self.decode(self.rows[index], int(self._epoch), name=f"of row {index}")
        return row if row is None or self.ids is None else {**row, self.ids: index}


class ImageStream(datasets.IterableDataset):
    """An endless stream: one epoch after another, each with its own order and augmentation.

    A resumed Trainer first reads the batches of earlier steps again, so the stream must not end after its first epoch.
    If ranks outnumber files, they share each file row by row. Only the rank that trains on a row decodes it. The
    workers of a rank read their own files, so a worker with fewer rows has shorter epochs.
    """

    @classmethod
    def of(cls, rows: datasets.IterableDataset, decode: ImageDecoder, buffer: int) -> ImageStream:
        """Make a stream of encoded `rows`, shuffled by the decoder's seed in a buffer of `buffer` rows."""
        stream = cls._around(rows.shuffle(seed=decode.seed, buffer_size=buffer), decode, (0, 1))
        stream.__dict__ |= {"source": rows, "buffer": buffer}
        return stream

    @classmethod
    def _around(cls, rows: datasets.IterableDataset, decode: ImageDecoder, part: tuple[int, int]) -> ImageStream:
        stream = cls.__new__(cls)
        stream.__dict__ = rows.__dict__ | {"decode": decode, "part": part}
        return stream

    def with_seed(self, seed: int) -> ImageStream:
        """Return the same rows in another order, with other augmentation."""
        return self.of(self.source, self.decode.with_seed(seed), self.buffer)

    @property
    def column_names(self) -> None:
        """Return None, so that nobody drops columns that the decoder needs."""
        return None

    @property
    def n_shards(self) -> int:
        """Return a number so large that accelerate always shards by rank; `shard` handles any number of ranks."""
        return 2**31

    def shard(self, num_shards: int, index: int, contiguous: bool = True) -> ImageStream:
        """Return part `index` of `num_shards`: whole files if there are enough, else every `num_shards`-th row."""
        if self.num_shards < num_shards:
            return self._around(self, self.decode, (index, num_shards))
        return self._around(super().shard(num_shards, index, contiguous), self.decode, self.part)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in itertools.count():
            one_epoch = copy.copy(self)
            one_epoch._epoch = torch.tensor(epoch)  # all workers would change a shared one
            rows = _readable(super(ImageStream, one_epoch).__iter__())
            read = good = 0
            for row in itertools.islice(rows, self.part[0], None, self.part[1]):
                decoded = self.decode(row, epoch, name=f"number {read} of epoch {epoch}")
                read += 1
                if decoded is not None:
                    good += 1
                    yield decoded
            if read and not good:
                raise ValueError(f"none of the {read} images of an epoch could be decoded; check the data.")
            if not read:
                return  # a worker without a file


def _readable(rows: Iterator[Any]) -> Iterator[Any]:
    """Yield the rows; raise ConnectionError if reading fails after the retries of `datasets`."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            said = " ".join(str(error).split())
            raise ConnectionError(
                f"The data could not be read any further ({type(error).__name__}: {said}). For more retries, "
                "raise datasets.config.STREAMING_READ_MAX_RETRIES or STREAMING_READ_RETRY_INTERVAL (seconds)."
            ) from error
        yield row
