"""Splits of images: columns, classes, labels, rows for evaluation, and what is wrong with a dataset."""

import io
import tarfile

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from images import encode, load, pixels

from hf_guidance.tasks import build_task
from hf_guidance.tasks.image_decoding import PixelFormat
from hf_guidance.tasks.image_splits import check_labels, class_names, evaluation_splits, find_columns


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


def test_rows_that_come_class_by_class_are_shuffled_before_some_are_taken(tmp_path):
    labelled = {"image": Image(), "label": ClassLabel(names=["a", "b"])}
    folder = rows_of(tmp_path, labelled, {"image": [PICTURE] * 40, "label": [0] * 20 + [1] * 20})
    task = load(folder, eval_size=8, train_size=8)
    assert {task.train_dataset[i]["labels"] for i in range(8)} == {0, 1}
    labels = [task.eval_dataset[i]["labels"] for i in range(8)] + [task.test_dataset[i]["labels"] for i in range(8)]
    assert set(labels) == {0, 1}


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


def test_columns_are_found_by_their_types_and_names():
    features = Features({"id": Value("int64"), "picture": Image(), "fine_label": Value("int64")})
    assert find_columns(features, "data", None, None) == ("picture", "fine_label")
    named = Features({"picture": Image(), "label": Value("int64"), "kind": ClassLabel(names=["a", "b"])})
    assert find_columns(named, "data", None, None) == ("picture", "kind")
    assert find_columns(named, "data", None, "label") == ("picture", "label")
    assert class_names(named, "kind", "data", None) == ["a", "b"]
    assert class_names(named, "label", "data", 3) == ["0", "1", "2"]


def test_every_second_row_validates_where_one_split_is_missing():
    rows = Dataset.from_dict({"label": [3, 1, 2, 0, 5, 4]})
    for splits in ({"test": rows}, {"val": rows}, {"val": rows, "test": Dataset.from_dict({"label": [-1, -1]})}):
        validation, test = evaluation_splits(splits, "label", "data", None)
        assert (validation["label"][:], test["label"][:]) == ([3, 2, 5], [1, 0, 4])
    both = evaluation_splits({"dev": rows, "test": rows.select([5])}, "label", "data", 2)
    assert [split["label"][:] for split in both] == [[3, 1], [4]]


def test_a_label_that_is_no_class_is_named_by_its_row():
    rows = Dataset.from_dict({"label": [0, 2, 1]})
    check_labels(rows, "label", 3, "train on")
    with pytest.raises(ValueError, match=r"image of row 1 to train on: its label is 2, but num_labels is 2 \(0 … 1\)"):
        check_labels(rows, "label", 2, "train on")
