"""Images from files to batches: decoding, augmentation, splits, streams, formats, errors."""

import io
import json
import os
import subprocess
import sys
import tarfile

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import torchvision.transforms as T
from datasets import ClassLabel, Dataset, Features, Image, Value
from hub import Hub
from images import encode, imagenet_files, imagenet_rows, parquet, pixels, truncate, write
from sklearn.metrics import top_k_accuracy_score
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, EvalPrediction

from hf_guidance.tasks import build_task, image_classification, image_decoding
from hf_guidance.tasks.image_decoding import ImageCollator, ImageDecoder, PixelFormat

SMALL = PixelFormat(16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return write(tmp_path_factory.mktemp("imagenet"), imagenet_files())


def load(folder, **options):
    return image_classification(folder, **{"target": SMALL, **options})


def name_of(rows, image):
    """The number of the row an image was made from, by its pixels."""
    return min(range(len(rows)), key=lambda i: np.abs(rows[i].astype(int) - image.numpy().astype(int)).sum())


# ------------------------------------------------------------------------------------------------------ one image


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


def decoder(**options):
    defaults = {"sizes": [16], "columns": ("image", "label"), "classes": 1000}
    return ImageDecoder(**(defaults | options))


def test_augmentation_is_torchvisions_and_a_function_of_seed_epoch_and_content():
    rows = imagenet_rows(6, odd=False)
    train = decoder(augmentation="crop_flip", seed=3)
    before = torch.get_rng_state()
    views = [train(rows[0], epoch)["pixel_values"][0] for epoch in range(40)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len({view.numpy().tobytes() for view in views}) > 35
    assert torch.equal(train(rows[0], 7)["pixel_values"][0], views[7])
    assert not torch.equal(decoder(augmentation="crop_flip", seed=4)(rows[0], 7)["pixel_values"][0], views[7])
    image = PIL.Image.open(io.BytesIO(rows[0]["image"]["bytes"]))
    reference = T.Compose([T.RandomResizedCrop(16), T.RandomHorizontalFlip(), T.PILToTensor()])
    torch.manual_seed(0)
    means = torch.tensor([reference(image).float().mean() for _ in range(300)])
    ours = torch.tensor([train(rows[0], epoch)["pixel_values"][0].float().mean() for epoch in range(300)])
    assert ours.mean() == pytest.approx(float(means.mean()), abs=3 * float(means.std()) / 300**0.5 * 2**0.5)
    assert ours.std() == pytest.approx(float(means.std()), rel=0.2)


def test_half_of_the_images_are_flipped():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, 12:] = 255
    flips = 0
    for number in range(200):
        image[0, 0] = number  # other content, another draw
        row = {"image": {"bytes": encode(image, kind="PNG"), "path": None}, "label": 0}
        view = decoder(augmentation="crop_flip")(row)["pixel_values"][0].float()
        flips += view[..., :8].mean() > view[..., 8:].mean()
    assert 70 < flips < 130


def test_both_sizes_show_the_same_crop():
    train = decoder(sizes=[16, 32], augmentation="crop_flip")
    for row in imagenet_rows(5, odd=False):
        small, large = (view.float() for view in train(row, 1)["pixel_values"])
        assert (large.shape, small.shape) == ((3, 32, 32), (3, 16, 16))
        halved = torch.nn.functional.avg_pool2d(large[None], 2)[0]
        assert torch.corrcoef(torch.stack([halved.flatten(), small.flatten()]))[0, 1] > 0.9


def test_grey_cmyk_and_turned_images_become_upright_rgb():
    array = pixels(1, (24, 24))
    upright = decoder(sizes=[24])
    for mode in ("L", "CMYK", "RGB"):
        row = {"image": {"bytes": encode(array, mode), "path": "a"}, "label": 1}
        assert upright(row)["pixel_values"][0].shape == (3, 24, 24)
    image, turned = PIL.Image.fromarray(array), io.BytesIO()
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 3  # upside down
    image.rotate(180).save(turned, "PNG", exif=exif)
    view = upright({"image": {"bytes": turned.getvalue(), "path": "a"}, "label": 1})["pixel_values"][0]
    assert torch.equal(view, torch.from_numpy(array).permute(2, 0, 1))


def test_sixteen_bits_are_scaled_and_floating_point_and_missing_images_are_bad():
    ramp = np.linspace(0, 65535, 24 * 24).reshape(24, 24).astype(np.uint16)
    buffer = io.BytesIO()
    PIL.Image.fromarray(ramp).save(buffer, "PNG")
    view = decoder(sizes=[24])({"image": {"bytes": buffer.getvalue(), "path": "a"}, "label": 1})["pixel_values"][0]
    assert np.abs(view[0].numpy().astype(int) - ramp / 257).max() <= 1
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.ones((4, 4), np.float32)).save(buffer, "TIFF")
    for encoded, words in (
        ({"bytes": buffer.getvalue(), "path": "a.tiff"}, r"a\.tiff cannot be decoded: its pixels are floating-point"),
        ({"bytes": None, "path": None}, "the row holds no image"),
        (None, "the row holds no image"),
    ):
        with pytest.raises(ValueError, match=words):
            decoder()({"image": encoded, "label": 0})
        assert decoder(on_bad_image="skip")({"image": encoded, "label": 0}) is None


def test_one_decode_serves_two_normalisations():
    target, guide = SMALL, PixelFormat(16, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    row = decoder()(imagenet_rows(1)[0])
    assert len(row["pixel_values"]) == 1
    batch = ImageCollator(target, guide)([row, row])
    whole = row["pixel_values"][0].float() / 255
    for name, form in (("pixel_values", target), ("guide_pixel_values", guide)):
        expected = (whole - torch.tensor(form.mean)[:, None, None]) / torch.tensor(form.std)[:, None, None]
        torch.testing.assert_close(batch[name][1], expected, atol=1e-5, rtol=1e-5)
    assert set(ImageCollator(target, SMALL)([row])) == {"pixel_values", "labels"}


# ------------------------------------------------------------------------------------------------- whole data sets


def test_digits_are_scikit_learns_in_three_disjoint_stratified_splits():
    task = build_task("image_classification", target=PixelFormat(8, (0, 0, 0), (1, 1, 1)))
    splits = task.train_dataset, task.eval_dataset, task.test_dataset
    assert [len(split) for split in splits] == [1197, 300, 300]
    assert task.labels == tuple("0123456789")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    known = {(bytes((row * 255 / 16).astype(np.uint8)), label) for row, label in zip(images, labels, strict=True)}
    seen = [
        (row["pixel_values"][0][0].numpy().tobytes(), row["labels"])
        for split in splits
        for row in (split[i] for i in range(len(split)))
    ]
    assert set(seen) == known
    assert len(seen) == 1797
    counts = np.bincount([label for _, label in seen[1197:1497]])
    assert counts.min() >= 28


def test_imagenets_unlabelled_test_split_counts_as_missing(imagenet):
    task = load(imagenet)
    assert len(task.train_dataset) == 48
    assert [task.eval_dataset[i]["labels"] for i in range(len(task.eval_dataset))] == list(range(500, 512, 2))
    assert [task.test_dataset[i]["labels"] for i in range(len(task.test_dataset))] == list(range(501, 512, 2))
    assert len(task.labels) == 1000
    assert len(load(imagenet, eval_size=2).eval_dataset) == 2


def test_a_folder_of_images_a_webdataset_and_plain_integers_are_read(tmp_path):
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            for number in range(3):
                name = tmp_path / "folder" / split / label / f"{number}.png"
                name.parent.mkdir(parents=True, exist_ok=True)
                name.write_bytes(encode(pixels(number), kind="PNG"))
    for streaming in (False, True):
        task = load(str(tmp_path / "folder"), streaming=streaming)
        assert task.labels == ("cat", "dog")
        rows = iter(task.train_dataset)
        assert {next(rows)["labels"] for _ in range(6)} == {0, 1}
    (tmp_path / "web").mkdir()
    for split in ("train", "test"):
        with tarfile.open(tmp_path / "web" / f"{split}-0.tar", "w") as tar:
            for number in range(4):
                for suffix, content in (("jpg", encode(pixels(number))), ("cls", str(number).encode())):
                    info = tarfile.TarInfo(f"{number}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    task = load(str(tmp_path / "web"), streaming=True, num_labels=4, shuffle_buffer=1)
    stream = iter(task.train_dataset)
    assert [next(stream)["labels"] for _ in range(4)] == [0, 1, 2, 3]


def test_metrics_are_scikit_learns():
    task = image_classification()
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(200, 10)), generator.integers(10, size=200)
    best = task.preprocess_logits_for_metrics((torch.tensor(logits), None), None)
    metrics = task.compute_metrics(EvalPrediction(best.numpy(), labels))
    for k, name in ((1, "accuracy"), (5, "top_5_accuracy")):
        assert metrics[name] == pytest.approx(top_k_accuracy_score(labels, logits, k=k))


# ---------------------------------------------------------------------------------------------------------- streams


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


def test_rows_that_come_class_by_class_are_shuffled_before_some_are_taken(tmp_path):
    labelled = {"image": Image(), "label": ClassLabel(names=["a", "b"])}
    folder = rows_of(tmp_path, labelled, {"image": [PICTURE] * 40, "label": [0] * 20 + [1] * 20})
    task = load(folder, eval_size=8, train_size=8)
    assert {task.train_dataset[i]["labels"] for i in range(8)} == {0, 1}
    labels = [task.eval_dataset[i]["labels"] for i in range(8)] + [task.test_dataset[i]["labels"] for i in range(8)]
    assert set(labels) == {0, 1}


def test_some_rows_to_train_on(imagenet):
    assert len(load(imagenet, train_size=5).train_dataset) == 5
    for options, words in (
        ({"train_size": 0}, "train_size is 0; it must be at least 1"),
        ({"train_size": 100}, "train_size is 100, but .* has 48 rows to train on"),
        ({"train_size": 5, "streaming": True}, "train_size is 5, but the dataset is a stream: leave it out"),
    ):
        with pytest.raises(ValueError, match=words):
            load(imagenet, **options)


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


# ------------------------------------------------------------------------------------------------------- bad images


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


def test_a_batch_of_bad_images_alone_is_an_error():
    with pytest.raises(ValueError, match="none of the 3 images of a batch could be decoded"):
        ImageCollator(SMALL)([None, None, None])


# ---------------------------------------------------------------------------------------------------- what is wrong


def rows_of(folder, features, values, splits=("train", "test")):
    made = {split: Dataset.from_dict(values, features=Features(features)) for split in splits}
    for split, rows in made.items():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


PICTURE = {"bytes": encode(pixels(0), kind="PNG"), "path": None}


@pytest.mark.parametrize(
    ("features", "values", "options", "words"),
    [
        ({"image": Image(), "label": Value("int64")}, ([PICTURE], [5]), {"num_labels": 5},
         r"its label is 5, but num_labels is 5 \(0 … 4\)"),
        ({"image": Image(), "label": Value("int64")}, ([PICTURE], [0]), {}, "not name the classes .* set num_labels"),
        ({"a": Image(), "b": Image()}, ([PICTURE], [PICTURE]), {}, "a, b, and the one with the images is not clear"),
        ({"image": Image(), "y": Value("int64")}, ([PICTURE], [0]), {}, "the classes is not clear: set label_column"),
        ({"image": Image(), "label": ClassLabel(names=["a"])}, ([PICTURE], [0]), {"image_column": "img"},
         "the one with the images is not among them: set image_column"),
        ({"image": Image(), "label": Value("string")}, ([PICTURE], ["cat"]), {"num_labels": 2},
         "the column 'label' holds Value.*expected classes as whole numbers"),
        ({"image": Image(), "label": ClassLabel(names=["a"])}, ([PICTURE], [0]), {"image_column": "label"},
         "the column 'label' holds ClassLabel.*expected images"),
        ({"image": Image(), "label": ClassLabel(names=["a"])}, ([PICTURE], [0]), {"num_labels": 3},
         "num_labels is 3, but .* names 1 classes"),
        ({"image": Image(), "label": ClassLabel(names=["a"])}, ([PICTURE], [0]), {"augmentation": "flip"},
         "augmentation is 'flip'; possible are none, crop_flip"),
        ({"image": Image(), "label": ClassLabel(names=["a"])}, ([PICTURE], [0]), {"on_bad_image": "ignore"},
         "on_bad_image is 'ignore'; possible are raise, skip"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_dataset_is_said(features, values, options, words, tmp_path):
    folder = rows_of(tmp_path, features, dict(zip(features, values, strict=True)))
    with pytest.raises(ValueError, match=words):
        load(folder, **options).train_dataset[0]


@pytest.mark.parametrize(("label", "shown"), [(5, "5"), (-1, "-1"), (None, "None")])
@pytest.mark.parametrize(
    ("split", "use"), [("train", "train on"), ("validation", "validate with"), ("test", "test with")]
)
def test_labels_of_held_splits_are_checked_at_once_and_those_of_a_stream_when_read(label, shown, split, use, tmp_path):
    features = {"image": Image(), "label": Value("int64")}
    for name in ("train", "validation", "test"):
        values = {"image": 3 * [PICTURE], "label": [0, 4, label if name == split else 3]}
        rows_of(tmp_path, features, values, [name])
    words = rf"its label is {shown}, but num_labels is 5 \(0 … 4\): choose a labelled split, or correct the labels"
    with pytest.raises(ValueError, match=f"image of row 2 to {use}: {words}"):
        load(str(tmp_path), num_labels=5)
    if split != "train":
        with pytest.raises(ValueError, match=words):
            load(str(tmp_path), num_labels=5, streaming=True)
        return
    stream = load(str(tmp_path), num_labels=5, streaming=True).train_dataset
    with pytest.raises(ValueError, match=words):
        list(zip(range(4), stream, strict=False))


def test_missing_splits_and_datasets_are_named(tmp_path):
    labelled = {"image": Image(), "label": ClassLabel(names=["a"])}
    values = {"image": [PICTURE], "label": [0]}
    with pytest.raises(ValueError, match="has only the splits train; validation needs one of validation, valid"):
        load(rows_of(tmp_path / "one", labelled, values, ["train"]))
    with pytest.raises(ValueError, match="has no split 'train'; it has test"):
        load(rows_of(tmp_path / "two", labelled, values, ["test"]))
    with pytest.raises(ValueError, match="not found: it is no local folder"):
        load(str(tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------------------ over HTTP

READ = """
import json, sys
import datasets
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0.01
if len(sys.argv) > 2:
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = int(sys.argv[2])
from hf_guidance.tasks import image_classification
try:
    task = image_classification(sys.argv[1], streaming=True, shuffle_buffer=8)
    rows = iter(task.train_dataset)
    print("RESULT", json.dumps([next(rows)["labels"] for _ in range(48)]))
except Exception as error:
    print("ERROR", type(error).__name__, error)
"""


def read(hub, home, *words, token=True):
    environment = {**os.environ, **hub.environment(home, token)}
    command = [sys.executable, "-c", READ, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=False)
    return done.stdout + done.stderr[-3000:]


def test_a_gated_dataset_streams_from_the_hub_though_connections_drop(tmp_path):
    calls = []

    def drop(method, path):
        calls.append(path)
        return "cut" if method == "GET" and "/resolve/" in path and "train" in path and len(calls) % 4 == 0 else None

    with Hub(tmp_path / "hub", gated=["dataset/ILSVRC/imagenet-1k"]) as hub:
        hub.store.add("dataset/ILSVRC/imagenet-1k", imagenet_files())
        printed = read(hub, tmp_path / "a", "ILSVRC/imagenet-1k", token=False)
        assert "the dataset ILSVRC/imagenet-1k is gated: accept its terms at http://127.0.0.1" in printed
        assert "run `hf auth login` or set HF_TOKEN" in printed
        hub.fault = drop
        printed = read(hub, tmp_path / "b", "ILSVRC/imagenet-1k")
        assert "RESULT" in printed, printed
        assert sorted(json.loads(printed.split("RESULT")[1].splitlines()[0])) == list(range(48))
        assert len(calls) > 8
