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
STREAMED_EVALUATION = 5000  # of ImageNet, half a gigabyte


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
    seed: int = 0,
) -> Task:
    """Name the class of an image.

    Args:
        dataset: Hub id or local folder (parquet, images in a folder per class, webdataset, …), or ``digits``, the 1797
            of scikit-learn. It has a split train; without a validation split the even rows of the test split validate
            and the odd ones test, and the other way round.
        dataset_config: its configuration, if it has several.
        streaming: whether to read the training split while training, shuffled within a buffer and without end; if
            not, it is downloaded first.
        target: how the target wants its pixels.
        guide: how the guide does, in ``guide_pixel_values``; None for the target's own.
        augmentation: ``none`` or ``crop_flip``, of the training images; the others are resized and cropped to their
            centre.
        image_column: name; None finds the one that holds images.
        label_column: name; None finds the one that holds classes.
        num_labels: of a dataset that does not name its classes.
        train_size: rows to train on; None for all. Not of a stream, whose steps say how much of it is read.
        eval_size: rows to validate, and to test, with at most; None for all, or for 5000 of a stream, which are held in
            memory, encoded.
        shuffle_buffer: encoded images of a stream that are shuffled among one another, in each worker.
        on_bad_image: ``raise``, or ``skip`` and count those that cannot be decoded.
        seed: of the stream's order and of the augmentation.

    Returns:
        The task; its metrics are `accuracy` and `top_5_accuracy`.

    Raises:
        ValueError: a dataset that is not there or not open to this user, without a split, column or class that is
            needed, or with a label that is none of its classes (in a stream, when its row is read); an option of
            another name.

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
                ", of a stream: leave it out, the steps say how much is read."
                if streaming
                else "; it must be at least 1."
            )
        )
    target = target or PixelFormat(28)
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
    decoder = partial(ImageDecoder, sizes, columns, len(names), crop=crop, seed=seed, on_bad_image=on_bad_image)
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
        eval_dataset=ImageRows(validation, decoder()),
        test_dataset=ImageRows(test, decoder()),
        data_collator=ImageCollator(target, guide),
        processing_class=image_processor(target, crop),
        compute_metrics=partial(_metrics, TopKAccuracy(k=TOP)),
        preprocess_logits_for_metrics=_best_classes,
        metric="accuracy",
        higher_is_better=True,
        labels=tuple(names),
    )


def image_processor(pixels: PixelFormat, crop: float = 1.0) -> Any:
    """What a saved target is used with: resizes, crops and normalises as validation does."""
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
    """The five best classes of each image, best first: `(batch, classes)` to `(batch, 5)`."""
    logits = main_logits(outputs)
    return logits.topk(min(TOP, logits.shape[-1])).indices


def check_last_batch(task: Task, batch: int) -> None:
    """Raise ValueError if an epoch would end in a batch of one image, which batch norm cannot take."""
    rows = len(task.train_dataset) if hasattr(task.train_dataset, "__len__") else 0
    if rows % batch == 1:
        raise ValueError(
            f"{rows} training images in batches of {batch} leave one over, and batch norm needs two: "
            "choose another --per_device_train_batch_size, or pass --dataloader_drop_last."
        )


def count_skipped(task: Task) -> str:
    """What is to be said of images that were skipped on any rank; every rank has to ask."""
    counts = {
        name: rows.decode.skipped
        for name, rows in (
            ("training", task.train_dataset),
            ("validation", task.eval_dataset),
            ("test", task.test_dataset),
        )
    }
    everyone = gather_object([counts])  # a rank counts its own alone
    counts = {name: sum(own[name] for own in everyone) for name in counts}
    return "".join(
        f"{count} {name} images could not be decoded and were skipped, counted each time they came.\n"
        for name, count in counts.items()
        if count
    )
