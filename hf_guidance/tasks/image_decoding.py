"""Decoding and augmentation of images: one decode and one crop, resized for target and guide."""

from __future__ import annotations

import copy
import logging
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from datasets.utils.file_utils import xopen
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

logger = logging.getLogger(__name__)

AUGMENTATIONS = ("none", "crop_flip", "shift")
CROP_FRACTION = 0.875  # of the shorter side, kept by the centre crop if training crops at random: 224 of 256


@dataclass(frozen=True)
class PixelFormat:
    """The size and normalisation of a network's images.

    Args:
        size: Height and width in pixels.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, for pixels in [0, 1].
    """

    size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def normalise(self, images: Sequence[Tensor]) -> Tensor:
        """Normalise images to one float32 batch `(n, channels, size, size)`.

        It works image by image, because one image fits into the CPU's cache.

        Args:
            images: Bytes, `(channels, size, size)` each.
        """
        mean, std = (torch.tensor(values).mul(255.0)[:, None, None] for values in (self.mean, self.std))
        batch = _room(len(images), *images[0].shape)
        for image, normalised in zip(images, batch, strict=True):
            torch.sub(image, mean, out=normalised).div_(std)
        return batch


def _room(*shape: int) -> Tensor:
    """Allocate a float32 tensor. In a loader's worker it is in shared memory, which saves a copy."""
    if get_worker_info() is None:
        return torch.empty(shape)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * torch.float32.itemsize)
    return torch.empty(0).set_(storage).view(shape)


class ImageDecoder:
    """A decoder from an encoded image and its label to a row of bytes.

    Augmentation depends only on seed, epoch and the bytes of the image. Workers, ranks and resumes do not change it.

    Args:
        sizes: Sizes of the images to make, in pixels; the first is that of the target.
        columns: Names of the columns with image and label; without a label, rows have none.
        classes: Number of classes.
        augmentation: `none` (resize, centre crop), `crop_flip` (a random crop of 8 to 100 % of the area, resized, and
            flipped half the time) or `shift` (an object at another place in each epoch).
        crop: Fraction of the shorter side that the centre crop keeps.
        seed: Seed of the augmentation.
        on_bad_image: `raise` or `skip` for images that cannot be decoded. The count of skipped images is shared by
            all workers.
        object_size: Size of the image on a black canvas of the first of `sizes`, at a place that depends on its bytes
            alone. None fills the canvas.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        columns: tuple[str, str | None],
        classes: int = 0,
        augmentation: str = "none",
        crop: float = 1.0,
        seed: int = 0,
        on_bad_image: str = "raise",
        object_size: int | None = None,
    ) -> None:
        self.object_size = object_size
        self.sizes, self.columns, self.classes = tuple(sizes), columns, classes
        self.augmentation, self.crop, self.seed, self.on_bad_image = augmentation, crop, seed, on_bad_image
        self._skipped = torch.zeros(1, dtype=torch.long).share_memory_()  # shared by all workers

    @property
    def skipped(self) -> int:
        """Return the number of images so far that could not be decoded."""
        return int(self._skipped)

    def with_seed(self, seed: int) -> ImageDecoder:
        """Return a copy with another seed, which shares the count of skipped images."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def __call__(self, row: dict[str, Any], epoch: int = 0, name: str = "") -> dict[str, Any] | None:
        """Decode a row to `pixel_values` (uint8, `(3, size, size)` for each size) and `labels`; None if skipped.

        Raises:
            ValueError: If the image cannot be decoded, or its label is not one of the classes.
        """
        image_column, label_column = self.columns
        encoded, labels = row[image_column], {} if label_column is None else {"labels": row[label_column]}
        name = (encoded.get("path") if isinstance(encoded, dict) else None) or name
        for label in labels.values():
            check_label(label, self.classes, name)
        try:
            content = _content(encoded)
            image = _decode(content)
        except (OSError, ValueError, SyntaxError, EOFError, PIL.Image.DecompressionBombError) as error:
            if self.on_bad_image == "raise":
                raise ValueError(
                    f"image {name} cannot be decoded: {error}. Repair or remove it, or set on_bad_image='skip' to "
                    "leave such images out."
                ) from error
            self._skipped += 1
            logger.warning("Skipped image %s, which cannot be decoded: %s.", name, error)
            return None
        return {"pixel_values": self._crop(image, content, epoch), **labels}

    def _crop(self, image: PIL.Image.Image, content: bytes, epoch: int) -> tuple[Tensor, ...]:
        if self.object_size is not None:
            image = self._place(_centre_crop(image, self.object_size, 1.0), content, epoch)
            return tuple(F.pil_to_tensor(_centre_crop(image, size, 1.0)) for size in self.sizes)
        if self.augmentation == "none":
            return tuple(F.pil_to_tensor(_centre_crop(image, size, self.crop)) for size in self.sizes)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(zlib.crc32(b"%d %d" % (self.seed, epoch), zlib.crc32(content)))
            box = RandomResizedCrop.get_params(image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
            flip = torch.rand(1) < 0.5
        views = [F.resized_crop(image, *box, [size, size], InterpolationMode.BILINEAR) for size in self.sizes]
        return tuple(F.pil_to_tensor(F.hflip(view) if flip else view) for view in views)

    def _place(self, image: PIL.Image.Image, content: bytes, epoch: int) -> PIL.Image.Image:
        """Put an image on a black canvas, at a place that its bytes decide, and the epoch if it is shifted."""
        key = b"%d %d" % (self.seed, epoch) if self.augmentation == "shift" else b""
        place = zlib.crc32(key, zlib.crc32(content))
        room = self.sizes[0] - image.size[0] + 1
        canvas = PIL.Image.new("RGB", (self.sizes[0], self.sizes[0]))
        canvas.paste(image, (place % room, place // room % room))
        return canvas


def check_label(label: int | None, classes: int, name: str) -> None:
    """Raise ValueError if a label is not one of the classes."""
    if label is None or not 0 <= label < classes:
        raise ValueError(
            f"image {name}: its label is {label}, but num_labels is {classes} (0 … {classes - 1}): "
            "choose a labelled split, or correct the labels."
        )


def _content(encoded: Any) -> bytes:
    """Return the bytes of an image, or those of the file at its path."""
    if encoded is None or (encoded.get("bytes") is None and encoded.get("path") is None):
        raise ValueError("the row holds no image")
    if encoded.get("bytes") is not None:
        return encoded["bytes"]
    with xopen(encoded["path"], "rb") as file:
        return file.read()


def _decode(content: bytes) -> PIL.Image.Image:
    image: PIL.Image.Image = PIL.Image.open(BytesIO(content))
    image.load()
    if image.getexif().get(PIL.Image.ExifTags.Base.Orientation) is not None:
        image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is unknown")
    if image.mode.startswith("I"):  # 16 bits per pixel, which convert would clip at 255
        image = PIL.Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _centre_crop(image: PIL.Image.Image, size: int, crop: float) -> PIL.Image.Image:
    shorter = round(size / crop)
    if min(image.size) != shorter:
        image = F.resize(image, [shorter], InterpolationMode.BILINEAR)
    return F.center_crop(image, [size, size])


class ImageCollator:
    """A collator from rows of bytes to normalised pixels for the target, and for the guide if its format differs.

    Args:
        target: Image format of the target.
        guide: Image format of the guide; None if it is that of the target.
    """

    def __init__(self, target: PixelFormat, guide: PixelFormat | None = None) -> None:
        self.target, self.guide = target, None if guide == target else guide

    def __call__(self, rows: Sequence[dict[str, Any] | None]) -> dict[str, Tensor]:
        good = [row for row in rows if row is not None]
        if not good:
            raise ValueError(f"none of the {len(rows)} images of a batch could be decoded; check the data.")
        views = list(zip(*(row["pixel_values"] for row in good), strict=True))
        numbers = [name for name in good[0] if name != "pixel_values"]  # labels, and ids if there are any
        batch = {"pixel_values": self.target.normalise(views[0])}
        batch |= {name: torch.tensor([row[name] for row in good]) for name in numbers}
        if self.guide is not None:
            batch["guide_pixel_values"] = self.guide.normalise(views[-1])
        return batch
