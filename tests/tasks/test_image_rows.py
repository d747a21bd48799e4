"""Rows of images, held or streamed: order, seeds, ranks and workers, and images that cannot be decoded."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hub import Hub
from images import SMALL, imagenet_files, imagenet_rows, load, parquet, truncate, write
from torch.utils.data import DataLoader

from hf_guidance.tasks import image_decoding
from hf_guidance.tasks.image_decoding import PixelFormat
from hf_guidance.tasks.image_rows import ImageRows, ImageStream


def numbers(stream, count):
    rows = iter(stream)
    return [next(rows)["labels"] for _ in range(count)]


def test_a_worker_collates_the_same_pixels_and_does_so_where_they_need_not_be_copied_from(imagenet, monkeypatch):
    task = load(imagenet, guide=PixelFormat(24))

    def batches(workers):
        return list(DataLoader(task.eval_dataset, 4, num_workers=workers, collate_fn=task.data_collator))

    for here, there in zip(batches(0), batches(1), strict=True):
        assert here.keys() == there.keys() == {"pixel_values", "guide_pixel_values", "labels"}
        assert all(torch.equal(here[name], there[name]) for name in here)
    images = task.eval_dataset[0]["pixel_values"][:1]
    assert not SMALL.normalise(images).is_shared()
    monkeypatch.setattr(image_decoding, "get_worker_info", lambda: "a worker")
    assert SMALL.normalise(images).is_shared()


def test_a_stream_goes_on_epoch_after_epoch_each_whole_and_in_another_order(imagenet):
    stream = load(imagenet, streaming=True, shuffle_buffer=10).train_dataset
    seen = numbers(stream, 3 * 48)
    epochs = [seen[i * 48 : (i + 1) * 48] for i in range(3)]
    assert all(sorted(epoch) == list(range(48)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert numbers(stream, 3 * 48) == seen  # the same again when read again, as a resumed training does


def test_another_seed_is_another_order_and_another_augmentation(imagenet):
    stream = load(imagenet, streaming=True, shuffle_buffer=10, augmentation="crop_flip").train_dataset
    other = stream.with_seed(1)
    assert numbers(other, 48) != numbers(stream, 48)
    assert numbers(stream.with_seed(0), 48) == numbers(stream, 48)
    assert sorted(numbers(other, 48)) == list(range(48))
    rows = load(imagenet, augmentation="crop_flip").train_dataset
    assert not torch.equal(rows[0]["pixel_values"][0], rows.with_seed(1)[0]["pixel_values"][0])
    assert torch.equal(rows[0]["pixel_values"][0], rows.with_seed(0)[0]["pixel_values"][0])


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_share_an_epoch_without_loss_or_duplication(imagenet, ranks, workers):
    stream = load(imagenet, streaming=True, shuffle_buffer=4, augmentation="crop_flip").train_dataset
    seen = []
    for rank in range(ranks):
        part = stream if ranks == 1 else stream.shard(num_shards=ranks, index=rank)  # as accelerate does
        finite = First(part)
        seen += [int(x) for x in DataLoader(finite, batch_size=None, num_workers=workers)]
    assert sorted(seen) == list(range(48))


class First(torch.utils.data.IterableDataset):
    """Labels of the first epoch of an endless stream, in whatever worker."""

    def __init__(self, stream):
        self.stream = stream

    def __iter__(self):
        epochs = []

        def decode(row, epoch, name):
            epochs.append(epoch)
            return row["label"]

        self.stream.decode = decode
        for label in self.stream:
            if epochs[-1]:
                return
            yield label


def test_rows_of_a_second_epoch_are_augmented_anew_and_workers_that_outlive_an_epoch_know(imagenet):
    task = load(imagenet, augmentation="crop_flip")
    loader = DataLoader(task.train_dataset, 16, num_workers=1, persistent_workers=True, collate_fn=task.data_collator)
    first = torch.cat([batch["pixel_values"] for batch in loader])
    task.train_dataset.set_epoch(1)
    second = torch.cat([batch["pixel_values"] for batch in loader])
    task.train_dataset.set_epoch(0)
    again = torch.cat([batch["pixel_values"] for batch in loader])
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    rows = imagenet_rows(12)
    rows[7] = truncate(rows[7])
    files = imagenet_files(shards=1) | {"data/train-00000-of-00001.parquet": parquet(rows)}
    return write(tmp_path_factory.mktemp("damaged"), files)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_undecodable_image_stops_with_its_name_or_is_skipped_and_counted(damaged, streaming, caplog):
    task = load(damaged, streaming=streaming, shuffle_buffer=1)
    with pytest.raises(ValueError, match=r"image n00000007\.JPEG cannot be decoded: (?i:.*truncated).*on_bad"):
        list(zip(range(12), task.train_dataset, strict=False))
    task = load(damaged, streaming=streaming, shuffle_buffer=1, on_bad_image="skip")
    loader = DataLoader(task.train_dataset, 6, num_workers=1, collate_fn=task.data_collator)
    batches = iter(loader)
    seen = [label for _ in range(2) for label in next(batches)["labels"].tolist()]
    assert 7 not in seen[:11]
    assert len(seen) == (12 if streaming else 11)  # a stream fills the batch up
    assert task.train_dataset.decode.skipped >= 1
    assert task.eval_dataset.decode.skipped == 0


def test_a_stream_of_bad_images_alone_ends_in_an_error(tmp_path):
    files = {path: parquet([truncate(row) for row in imagenet_rows(3)]) for path in imagenet_files(shards=1)}
    stream = load(write(tmp_path, files), streaming=True, on_bad_image="skip", eval_size=2).train_dataset
    with pytest.raises(ValueError, match="none of the 3 images of an epoch could be decoded"):
        next(iter(stream))


READ = """
import json, os
import datasets
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0.01
from hf_guidance.tasks import image_classification
token = os.environ.pop("HF_TOKEN")
try:
    image_classification("ILSVRC/imagenet-1k", streaming=True)
except ValueError as error:
    print("REFUSED", error)
os.environ["HF_TOKEN"] = token
task = image_classification("ILSVRC/imagenet-1k", streaming=True, shuffle_buffer=8)
rows = iter(task.train_dataset)
print("RESULT", json.dumps([next(rows)["labels"] for _ in range(48)]))
"""


def test_a_gated_dataset_streams_from_the_hub_though_connections_drop(tmp_path):
    calls = []

    def drop(method, path):
        calls.append(path)
        return "cut" if method == "GET" and "/resolve/" in path and "train" in path and len(calls) % 4 == 0 else None

    with Hub(tmp_path / "hub", gated=["dataset/ILSVRC/imagenet-1k"], fault=drop) as hub:
        hub.store.add("dataset/ILSVRC/imagenet-1k", imagenet_files())
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        command = [sys.executable, "-c", READ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    refused, result = done.stdout.split("RESULT")
    assert "REFUSED the dataset ILSVRC/imagenet-1k is gated: accept its terms at http://127.0.0.1" in refused
    assert "run `hf auth login` or set HF_TOKEN" in refused
    assert sorted(json.loads(result.splitlines()[0])) == list(range(48))
    assert len(calls) > 8


def test_rows_have_ids_where_they_are_the_same_in_every_epoch(imagenet):
    rows = load(imagenet).train_dataset
    assert isinstance(rows, ImageRows)
    assert [rows.with_ids("number")[index]["number"] for index in (0, 5)] == [0, 5]
    assert "number" not in rows[0]
    with pytest.raises(ValueError, match="augmentation is 'crop_flip': set augmentation='none', or leave cache_guide"):
        load(imagenet, augmentation="crop_flip").train_dataset.with_ids("number")


def test_a_stream_keeps_its_columns_and_is_always_shared_by_rank(imagenet):
    stream = load(imagenet, streaming=True).train_dataset
    assert isinstance(stream, ImageStream)
    assert stream.column_names is None  # else Trainer would drop the image
    assert stream.n_shards > 10**6
    assert numbers(stream.shard(2, 0), 24) != numbers(stream.shard(2, 1), 24)
