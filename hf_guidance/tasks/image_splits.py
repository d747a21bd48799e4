"""Splits of encoded images, from the Hub, a folder or scikit-learn."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from .image_decoding import check_label
from .splits import read_splits

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

logger = logging.getLogger(__name__)

VALIDATION = ("validation", "valid", "val", "dev")
LABELS = ("label", "labels", "fine_label", "cls", "class")
CHUNK = 500  # rows of a stream in one table, whose columns hold at most two gigabytes


def digits() -> dict[str, Dataset]:
    """Load scikit-learn's 1797 handwritten digits of 8 × 8 pixels: two thirds for training, a sixth each for
    evaluation.
    """
    import PIL.Image
    from datasets import ClassLabel, Dataset, Features, Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, rest = train_test_split(np.arange(len(labels)), train_size=1197, stratify=labels, random_state=0)
    validation, test = train_test_split(rest, train_size=300, stratify=labels[rest], random_state=0)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})

    def encode(row: np.ndarray) -> dict[str, Any]:
        buffer = BytesIO()
        PIL.Image.fromarray((row.reshape(8, 8) * 255 / 16).astype(np.uint8)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    return {
        name: Dataset.from_dict(
            {"image": [encode(pixels[i]) for i in rows], "label": labels[rows].tolist()}, features=features
        )
        for name, rows in (("train", train), ("validation", validation), ("test", test))
    }


def load_splits(dataset: str, config: str | None, streaming: bool) -> dict[str, Any]:
    """Load the splits of a dataset from the Hub or a local folder.

    Args:
        dataset: Hub id or folder.
        config: Name of its configuration, if it has several.
        streaming: Whether to stream the dataset instead of downloading it first.

    Raises:
        ValueError: If the dataset has no split train. Also all that `read_splits` raises.
    """
    found = read_splits(dataset, config, streaming)
    if "train" not in found:
        raise ValueError(f"{dataset} has no split 'train'; it has {', '.join(found)}.")
    return found


def features_of(split: Dataset | IterableDataset, dataset: str) -> Features:
    """Return the features of a split, which a stream may have to read first. Raise ValueError if it has no rows."""
    features = split.features or split._resolve_features().features
    if not features:
        raise ValueError(f"the train split of {dataset} has no rows.")
    return features


def find_columns(features: Features, dataset: str, image: str | None, label: str | None) -> tuple[str, str]:
    """Find the columns with images and with classes.

    Args:
        features: Features of the dataset.
        dataset: Name of the dataset, for errors.
        image: Name of the image column; None finds it.
        label: Name of the class column; None finds it.

    Raises:
        ValueError: If a column is missing, ambiguous or of another type.
    """
    from datasets import ClassLabel

    classes = [label] if label else [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    classes = classes or [name for name in LABELS if name in features]
    of_images = find_image_column(features, dataset, image)
    if not classes or classes[0] not in features:
        raise _unclear(features, dataset, "classes", "label_column", classes)
    return of_images, classes[0]


def find_image_column(features: Features, dataset: str, image: str | None) -> str:
    """Find the column with images, as `find_columns` does."""
    from datasets import Image

    images = [image] if image else [name for name, kind in features.items() if isinstance(kind, Image)]
    if len(images) != 1 or images[0] not in features:
        raise _unclear(features, dataset, "images", "image_column", images)
    if not isinstance(features[images[0]], Image):
        raise ValueError(f"{dataset}: the column {images[0]!r} holds {features[images[0]]}; expected images.")
    return images[0]


def _unclear(features: Features, dataset: str, what: str, flag: str, found: Sequence[str]) -> ValueError:
    return ValueError(
        f"{dataset} has the columns {', '.join(features)}, and the one with the {what} is "
        f"{'not among them' if found and found[0] not in features else 'not clear'}: set {flag}."
    )


def class_names(features: Features, column: str, dataset: str, num_labels: int | None) -> list[str]:
    """Return the names of the classes, which are numbers if the dataset has no names.

    Args:
        features: Features of the dataset.
        column: Name of the class column.
        dataset: Name of the dataset, for errors.
        num_labels: Number of classes, for a dataset without names.

    Raises:
        ValueError: If the column holds no integers, or `num_labels` is missing or wrong.
    """
    kind = features[column]
    names = getattr(kind, "names", None)
    if names is None and not str(getattr(kind, "dtype", "")).lstrip("u").startswith("int"):
        raise ValueError(f"{dataset}: the column {column!r} holds {kind}; expected classes as whole numbers from 0.")
    if names is None and num_labels is None:
        raise ValueError(f"{dataset} does not name the classes of its column {column!r}: set num_labels.")
    if names is not None and num_labels not in (None, len(names)):
        raise ValueError(f"num_labels is {num_labels}, but {dataset} names {len(names)} classes: leave num_labels out.")
    return names or [str(number) for number in range(num_labels or 0)]


def training_rows(split: Dataset | IterableDataset, label: str, dataset: str, size: int | None) -> Any:
    """Select the first training rows, or all of them."""
    from datasets import Dataset

    if size is None or not isinstance(split, Dataset):
        return split
    if size > len(split):
        raise ValueError(f"train_size is {size}, but {dataset} has {len(split)} rows to train on.")
    return _rows(split, label, size)


def evaluation_splits(
    splits: Mapping[str, Dataset | IterableDataset], label: str, dataset: str, size: int | None
) -> tuple[Dataset, Dataset]:
    """Select validation and test rows, held in memory. A split without labels (ImageNet's test) counts as missing."""
    validation = next((splits[name] for name in VALIDATION if name in splits), None)
    test = splits.get("test")
    if test is not None and next(iter(test), {label: None})[label] in (None, -1):
        test = None
    if validation is not None and test is not None:
        return _rows(validation, label, size), _rows(test, label, size)
    one = validation if test is None else test
    if one is None:
        raise ValueError(
            f"{dataset} has only the splits {', '.join(splits)}; validation needs one of {', '.join(VALIDATION)} or "
            "test, with labels."
        )
    rows = _rows(one, label, size and 2 * size)
    return rows.select(range(0, len(rows), 2)), rows.select(range(1, len(rows), 2))


def check_labels(split: Dataset, column: str, classes: int, name: str) -> None:
    """Raise ValueError if a row in memory has a label that is not one of the classes."""
    labels = np.asarray(split.with_format("numpy")[column][:], dtype=float)  # NaN where there is no label
    wrong = np.flatnonzero(~((labels >= 0) & (labels < classes)))
    if len(wrong):
        row = int(wrong[0])
        check_label(split[row][column], classes, f"of row {row} to {name}")


def _rows(split: Dataset | IterableDataset, label: str, size: int | None) -> Dataset:
    """Load the first rows of a split into memory.

    If they are sorted by class, as in folders, a split on disk is shuffled first, and a stream gives a warning.
    """
    from datasets import Dataset, concatenate_datasets

    if isinstance(split, Dataset):
        size = min(size or len(split), len(split))
        if size < len(split) and _sorted(split.select(range(size))[label]):
            split = split.shuffle(seed=0)
        return split.select(range(size))
    features = split.features or split._resolve_features().features
    rows, parts = islice(split, size), []
    while part := list(islice(rows, CHUNK)):
        parts.append(Dataset.from_list(part, features=features))
    if not parts:
        raise ValueError("a split to evaluate on has no rows.")
    found = concatenate_datasets(parts)
    if len(found) == size and _sorted(found[label]):
        logger.warning("The first %d rows are sorted by class: evaluate on more rows, or shuffle the split.", size)
    return found


def _sorted(labels: Sequence[Any]) -> bool:
    return len(labels) > 1 and all(a <= b for a, b in pairwise(labels))
