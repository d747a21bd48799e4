"""From a dataset on the Hub, in a folder or in scikit-learn to splits of encoded images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from .image_decoding import check_label

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

logger = logging.getLogger(__name__)

VALIDATION = ("validation", "valid", "val", "dev")
LABELS = ("label", "labels", "fine_label", "cls", "class")
CHUNK = 500  # rows of a stream in one table: a column of one holds no more than two gigabytes


def digits() -> dict[str, Dataset]:
    """scikit-learn's 1797 hand-written digits of 8 × 8 pixels: two thirds to train on, a sixth each to evaluate."""
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
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.constants import ENDPOINT

    try:
        found = load_dataset(dataset, config, streaming=streaming)
    except (DatasetNotFoundError, FileNotFoundError) as error:
        if "gated" in str(error):
            raise ValueError(
                f"the dataset {dataset} is gated: accept its terms at {ENDPOINT}/datasets/{dataset}, make a token with "
                f"read rights at {ENDPOINT}/settings/tokens, then run `hf auth login` or set HF_TOKEN."
            ) from error
        raise ValueError(
            f"dataset {dataset!r} not found: it is no local folder with data, and the Hub has none of that name that "
            "this user may read (for a private one run `hf auth login` or set HF_TOKEN)."
        ) from error
    if "train" not in found:
        raise ValueError(f"{dataset} has no split 'train'; it has {', '.join(found)}.")
    return dict(found)


def features_of(split: Dataset | IterableDataset, dataset: str) -> Features:
    features = split.features or split._resolve_features().features
    if not features:
        raise ValueError(f"the train split of {dataset} has no rows.")
    return features


def find_columns(features: Features, dataset: str, image: str | None, label: str | None) -> tuple[str, str]:
    from datasets import ClassLabel, Image

    images = [image] if image else [name for name, kind in features.items() if isinstance(kind, Image)]
    classes = [label] if label else [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    classes = classes or [name for name in LABELS if name in features]
    for what, found, flag in (("images", images, "image_column"), ("classes", classes, "label_column")):
        if not found or found[0] not in features or (len(found) > 1 and what == "images"):
            raise ValueError(
                f"{dataset} has the columns {', '.join(features)}, and which holds the {what} is "
                f"{'not among them' if found and found[0] not in features else 'not clear'}: name it with {flag}."
            )
    if not isinstance(features[images[0]], Image):
        raise ValueError(f"{dataset}: the column {images[0]!r} holds {features[images[0]]}; expected images.")
    return images[0], classes[0]


def class_names(features: Features, column: str, dataset: str, num_labels: int | None) -> list[str]:
    kind = features[column]
    names = getattr(kind, "names", None)
    if names is None and not str(getattr(kind, "dtype", "")).lstrip("u").startswith("int"):
        raise ValueError(f"{dataset}: the column {column!r} holds {kind}; expected classes as whole numbers from 0 on.")
    if names is None and num_labels is None:
        raise ValueError(f"{dataset} does not name the classes of its column {column!r}: give num_labels.")
    if names is not None and num_labels not in (None, len(names)):
        raise ValueError(f"num_labels is {num_labels}, but {dataset} names {len(names)} classes: leave it out.")
    return names or [str(number) for number in range(num_labels or 0)]


def training_rows(split: Dataset | IterableDataset, label: str, dataset: str, size: int | None) -> Any:
    """The first rows to train on, or all of them."""
    from datasets import Dataset

    if size is None or not isinstance(split, Dataset):
        return split
    if size > len(split):
        raise ValueError(f"train_size is {size}, but {dataset} has {len(split)} rows to train on.")
    return _rows(split, label, size)


def evaluation_splits(
    splits: Mapping[str, Dataset | IterableDataset], label: str, dataset: str, size: int | None
) -> tuple[Dataset, Dataset]:
    """Rows to validate and to test with, in memory; a split without labels (ImageNet's test) counts as missing."""
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
    """Raise ValueError if a row of a split that is held has a label that is none of the classes."""
    labels = np.asarray(split.with_format("numpy")[column][:], dtype=float)  # NaN where there is none
    wrong = np.flatnonzero(~((labels >= 0) & (labels < classes)))
    if len(wrong):
        row = int(wrong[0])
        check_label(split[row][column], classes, f"of row {row} to {name}")


def _rows(split: Dataset | IterableDataset, label: str, size: int | None) -> Dataset:
    """The first rows of a split, in memory; of a shuffled one where they come class by class, as folders do."""
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
        logger.warning("The first %d rows come class by class: evaluate on more of them, or shuffle the split.", size)
    return found


def _sorted(labels: Sequence[Any]) -> bool:
    return len(labels) > 1 and all(a <= b for a, b in pairwise(labels))
