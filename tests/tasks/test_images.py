"""The task of naming the class of an image: its evaluation images, metrics, training rows and checks."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision.transforms as T
from images import SMALL, imagenet_files, imagenet_rows, load, parquet, pixels, truncate, write
from sklearn.metrics import top_k_accuracy_score
from transformers import AutoImageProcessor, EvalPrediction

from hf_guidance.tasks import image_classification
from hf_guidance.tasks.images import check_last_batch, count_skipped


def test_evaluation_resizes_and_crops_as_torchvision_does_and_the_saved_processor_agrees(imagenet, tmp_path):
    task = load(imagenet, augmentation="crop_flip")
    assert task.data_collator.guide is None
    own = T.Compose(
        [T.Resize(round(16 / 0.875)), T.CenterCrop(16), T.ToTensor(), T.Normalize(list(SMALL.mean), list(SMALL.std))]
    )
    images = [PIL.Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in imagenet_rows(12, 500)[::2]]
    batch = task.data_collator([task.eval_dataset[i] for i in range(6)])
    torch.testing.assert_close(batch["pixel_values"], torch.stack([own(image) for image in images]))
    assert batch["labels"].tolist() == [500, 502, 504, 506, 508, 510]
    task.processing_class.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    squares = [PIL.Image.fromarray(pixels(number, (24, 24))) for number in range(4)]  # others may shift by a pixel
    expected = torch.stack([own(image) for image in squares])
    processed = processor(squares, return_tensors="pt")["pixel_values"]
    assert (processed - expected).abs().max() < 2.5 / 255 / min(SMALL.std)  # it resizes tensors
    assert processor(images, return_tensors="pt")["pixel_values"].shape == batch["pixel_values"].shape


def test_metrics_are_scikit_learns():
    task = image_classification()
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(200, 10)), generator.integers(10, size=200)
    best = task.preprocess_logits_for_metrics((torch.tensor(logits), None), None)
    metrics = task.compute_metrics(EvalPrediction(best.numpy(), labels))
    for k, name in ((1, "accuracy"), (5, "top_5_accuracy")):
        assert metrics[name] == pytest.approx(top_k_accuracy_score(labels, logits, k=k))


def test_some_rows_to_train_on(imagenet):
    assert len(load(imagenet, train_size=5).train_dataset) == 5
    for options, words in (
        ({"train_size": 0}, "train_size is 0; it must be at least 1"),
        ({"train_size": 100}, "train_size is 100, but .* has 48 rows to train on"),
        ({"train_size": 5, "streaming": True}, "train_size is 5, but the dataset is a stream: leave it out"),
    ):
        with pytest.raises(ValueError, match=words):
            load(imagenet, **options)


@pytest.mark.parametrize(("rows", "batch"), [(48, 47), (5, 2)])
def test_a_last_batch_of_one_image_is_refused(rows, batch, imagenet):
    task = load(imagenet, train_size=rows)
    with pytest.raises(ValueError, match=f"{rows} training images in batches of {batch} leave one over"):
        check_last_batch(task, batch)
    check_last_batch(task, batch + 1)
    check_last_batch(load(imagenet, streaming=True), batch)  # a stream has no last batch


def test_skipped_images_are_counted_by_split(tmp_path):
    rows = imagenet_rows(12)
    for number in (1, 4):
        rows[number] = truncate(rows[number])
    files = imagenet_files(shards=1) | {"data/train-00000-of-00001.parquet": parquet(rows)}
    task = load(write(tmp_path, files), on_bad_image="skip")
    assert count_skipped(task) == ""
    for _ in range(2):
        assert [number for number in range(12) if task.train_dataset[number] is None] == [1, 4]
    assert count_skipped(task).startswith("4 training images could not be decoded and were skipped")
    assert count_skipped(task).count("\n") == 1
