"""Facts on data: their source, their size and how they are prepared."""

from types import SimpleNamespace

import pytest

from hf_guidance.card.facts import ANY_TEXT, example_of, known, processing_facts, rows_facts, task_facts


class Tokenizer:
    """A tokenizer of five words, of which two are special."""

    all_special_ids, unk_token_id = (0, 1), 1
    words = ("<pad>", "<unk>", "red", "green", "blue")

    def __init__(self, knows=()):
        self.knows = knows

    def __len__(self):
        return len(self.words)

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [2 if word in self.knows else 1 for word in text.split()]}

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


def test_what_is_empty_is_not_known_and_zero_and_false_are():
    assert known({"a": None, "b": "", "c": [], "d": {}, "e": 0, "f": False}) == {"e": 0, "f": False}


def test_rows_from_the_hub_have_its_id_and_commit():
    commit = "0123456789" * 4
    path = f"/cache/me___rows/default/0.0.0/{commit}/rows-train.arrow"
    rows = SimpleNamespace(info=SimpleNamespace(dataset_name="rows"), cache_files=[{"filename": path}])
    assert rows_facts(rows) == {"name": "rows", "id": "me/rows", "revision": commit}
    assert rows_facts([1] * 1234) == {"rows to train on": "1,234"}
    assert rows_facts(None) == {}


def test_a_tokenizer_is_told_by_its_class_and_size():
    assert processing_facts(Tokenizer()) == {"tokenizer": "Tokenizer, 5 tokens"}
    assert processing_facts(None) == {}


@pytest.mark.parametrize(
    ("crop", "pixels"),
    [({"do_center_crop": True, "crop_size": {"height": 8, "width": 6}}, "8 × 6 pixels"), ({}, "16 pixels")],
)
def test_an_image_processor_is_told_by_the_size_that_it_makes(crop, pixels):
    images = SimpleNamespace(image_mean=[0.5], image_std=[0.25], size={"shortest_edge": 16}, **crop)
    assert processing_facts(images) == {"images": pixels, "normalised by": "mean 0.5, std 0.25"}


def test_an_example_is_a_text_that_the_tokenizer_knows():
    assert example_of(Tokenizer(knows=ANY_TEXT.split())) == {"text": ANY_TEXT}
    assert example_of(Tokenizer()) == {"text": "red green blue"}
    assert example_of(None) is None


def test_the_data_of_a_task_are_named_by_their_source():
    assert task_facts("copy_paste", "Copy.", {"task": "copy_paste", "min_length": 8, "streaming": True}) == {
        "name": "copy paste data made on the fly",
        "task": "Copy.",
        "shortest string": 8,
    }
    files = {"text_files": [{"name": "a.txt"}, {"name": "b.txt"}], "dataset": "me/rows", "dataset_config": "x"}
    assert task_facts("language_modeling", "Guess.", files) == {"name": "a.txt, b.txt", "task": "Guess."}
    assert task_facts("t", "Guess.", {"dataset": "me/rows"})["id"] == "me/rows"
    for folder in ({"name": "rows", "files": "abc"}, "/data/me/rows"):
        assert task_facts("t", "Guess.", {"dataset": folder}) == {"name": "rows", "task": "Guess."}


def test_a_shuffle_buffer_is_a_streams_and_a_guides_images_are_told_where_they_differ():
    data = {"dataset": "digits", "shuffle_buffer": 20, "streaming": False}
    data["target"] = data["guide"] = {"size": 8, "mean": [0.5], "std": [0.5]}
    facts = task_facts("image_classification", "Name the class.", data)
    assert not {"shuffle buffer", "images of the guide"} & set(facts)
    data |= {"streaming": True, "guide": data["target"] | {"size": 32}}
    facts = task_facts("image_classification", "Name the class.", data)
    assert (facts["shuffle buffer"], facts["images of the guide"]) == (20, "32 × 32 pixels")
