"""Image classification on a dataset of the Hub, a local folder, or scikit-learn's digits; streamed if it is large."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from torch import Tensor
from transformers import CLIPImageProcessor, EvalPrediction

from .base import Task, main_logits

if TYPE_CHECKING:
    from .image_decoding import PixelFormat

TOP = 5
STREAMED_EVALUATION = 5000  # half a gigabyte of ImageNet


def image_classification(
    dataset: str = "digits",
    dataset_config: str | None = None,
    streaming: bool = False,
    target: PixelFormat | None = None,
    guide: PixelFormat | None = None,
    augmentation: str = "none",
    image_column: str | None = None,
    label_column: str | None = None,
    num_labels: int | None = None,
    train_size: int | None = None,
    eval_size: int | None = None,
    shuffle_buffer: int = 2000,
    on_bad_image: str = "raise",
    object_size: int | None = None,
    seed: int = 0,
) -> Task:
    """Build the task of naming the class of an image.

    Args:
        dataset: Hub id, local folder (parquet, images in a folder per class, webdataset, …), or `digits`, the 1797
            of scikit-learn. It needs a split train. If one of the splits validation and test is missing, the even
            rows of the other are for validation and the odd ones for the test.
        dataset_config: Name of its configuration, if it has several.
        streaming: Whether to stream the training split, endlessly and shuffled within a buffer, instead of downloading
            it first.
        target: Image format of the target; None means 28 × 28 pixels.
        guide: Image format of the guide, in the column `guide_pixel_values`; None uses the target's.
        augmentation: `none`, `crop_flip` or, with `object_size`, `shift` for the training images. Other images are
            resized and centre-cropped.
        image_column: Name of the column with images; None finds it.
        label_column: Name of the column with classes; None finds it.
        num_labels: Number of classes, for a dataset that does not name them.
        train_size: Number of training rows; None takes all. Leave it out for a stream, where `max_steps` decides.
        eval_size: Maximum number of rows for validation, and for the test, held in memory in encoded form. None takes
            all, or 5000 of a stream.
        shuffle_buffer: Encoded images in the shuffle buffer of a stream, in each worker.
        on_bad_image: `raise` for images that cannot be decoded, or `skip` and count them.
        object_size: Size of each image on a black canvas of the target's size, at a fixed place of its own. None fills
            the canvas.
        seed: Seed of the stream's order and of the augmentation.

    Returns:
        The task; its metrics are `accuracy` and `top_5_accuracy`.

    Raises:
        ValueError: If the dataset is missing or not accessible, if it lacks a split, column or class names, if a label
            is not one of its classes (in a stream, when that row is read), or if an option has an unknown value.

    Source: object recognition, Subramaniam et al., NeurIPS 2025 (arXiv 2410.20035).
    """
    from datasets import Image

    from .image_decoding import AUGMENTATIONS, CROP_FRACTION, ImageCollator, ImageDecoder, PixelFormat
    from .image_rows import ImageRows, ImageStream
    from .image_splits import (
        check_labels,
        class_names,
        digits,
        evaluation_splits,
        features_of,
        find_columns,
        load_splits,
        training_rows,
    )
    from .metrics import TopKAccuracy

    for name, value, possible in (
        ("augmentation", augmentation, AUGMENTATIONS),
        ("on_bad_image", on_bad_image, ("raise", "skip")),
    ):
        if value not in possible:
            raise ValueError(f"{name} is {value!r}; possible are {', '.join(possible)}.")
    if train_size is not None and (streaming or train_size < 1):
        raise ValueError(
            f"train_size is {train_size}"
            + (
                ", but the dataset is a stream: leave it out, max_steps decides how much is read."
                if streaming
                else "; it must be at least 1."
            )
        )
    target = target or PixelFormat(28)
    if object_size is not None and not 0 < object_size <= target.size:
        raise ValueError(
            f"object_size is {object_size}; it must be from 1 to the size of the target's images, {target.size}."
        )
    if augmentation == ("shift" if object_size is None else "crop_flip"):
        raise ValueError(
            f"augmentation={augmentation!r} with object_size={object_size}: shift moves an object on its canvas, so it "
            "needs object_size; crop_flip takes none."
        )
    splits = digits() if dataset == "digits" else load_splits(dataset, dataset_config, streaming)
    features = features_of(splits["train"], dataset)
    columns = find_columns(features, dataset, image_column, label_column)
    names = class_names(features, columns[1], dataset, num_labels)
    encoded = {name: split.select_columns(list(columns)) for name, split in splits.items()}
    encoded = {name: split.cast_column(columns[0], Image(decode=False)) for name, split in encoded.items()}
    most = STREAMED_EVALUATION if eval_size is None and streaming else eval_size
    validation, test = evaluation_splits(encoded, columns[1], dataset, most)
    sizes = (target.size,) if guide is None or guide.size == target.size else (target.size, guide.size)
    crop = CROP_FRACTION if augmentation == "crop_flip" else 1.0
    decoder = partial(
        ImageDecoder,
        sizes,
        columns,
        len(names),
        crop=crop,
        seed=seed,
        on_bad_image=on_bad_image,
        object_size=object_size,
    )
    still = decoder()
    train: Any = training_rows(encoded["train"], columns[1], dataset, train_size)
    if streaming and dataset != "digits":
        train = ImageStream.of(train, decoder(augmentation), shuffle_buffer)
    else:
        check_labels(train, columns[1], len(names), "train on")
        train = ImageRows(train, decoder(augmentation))
    check_labels(validation, columns[1], len(names), "validate with")
    check_labels(test, columns[1], len(names), "test with")
    return Task(
        name="image_classification",
        description=f"Name which of {len(names)} classes an image of {dataset.rstrip('/').split('/')[-1]} belongs to.",
        train_dataset=train,
        eval_dataset=ImageRows(validation, still),
        test_dataset=ImageRows(test, still),
        data_collator=ImageCollator(target, guide),
        processing_class=image_processor(target, crop),
        compute_metrics=partial(_metrics, TopKAccuracy(k=TOP)),
        preprocess_logits_for_metrics=_best_classes,
        metric="accuracy",
        higher_is_better=True,
        labels=tuple(names),
        chance=1 / len(names),
    )


def image_processor(pixels: PixelFormat, crop: float = 1.0) -> Any:
    """Build the image processor of a saved target, which resizes, crops and normalises as in validation."""
    return CLIPImageProcessor(
        size={"shortest_edge": round(pixels.size / crop)},
        crop_size={"height": pixels.size, "width": pixels.size},
        resample=2,  # bilinear
        image_mean=list(pixels.mean),
        image_std=list(pixels.std),
        do_convert_rgb=True,
    )


def _metrics(metric: Any, prediction: EvalPrediction) -> dict[str, float]:
    return metric.compute(predictions=prediction.predictions, references=prediction.label_ids)


def _best_classes(outputs: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return the five best classes of each image, best first: `(batch, classes)` to `(batch, 5)`."""
    logits = main_logits(outputs)
    return logits.topk(min(TOP, logits.shape[-1])).indices


def check_last_batch(task: Task, batch: int) -> None:
    """Raise ValueError if an epoch would end in a batch of one image, which batch norm cannot take.

    Args:
        task: The task; a stream has no last batch.
        batch: Rows in a batch.
    """
    rows = len(task.train_dataset) if hasattr(task.train_dataset, "__len__") else 0
    if rows % batch == 1:
        raise ValueError(
            f"{rows} training images in batches of {batch} leave one over, and batch norm needs two: "
            "choose another per_device_train_batch_size, or set dataloader_drop_last=True."
        )


def count_skipped(task: Task) -> str:
    """Report the images that were skipped on any rank; every rank must call it.

    Returns:
        One line per split with skipped images; empty if there are none.
    """
    counts = {
        name: rows.decode.skipped
        for name, rows in (
            ("training", task.train_dataset),
            ("validation", task.eval_dataset),
            ("test", task.test_dataset),
        )
    }
    everyone = gather_object([counts])  # each rank counts only its own images
    counts = {name: sum(own[name] for own in everyone) for name in counts}
    return "".join(
        f"{count} {name} images could not be decoded and were skipped, counted each time they were read.\n"
        for name, count in counts.items()
        if count
    )
