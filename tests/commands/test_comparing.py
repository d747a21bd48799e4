"""Two networks compared from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders import t5
from test_data import tokenizer, two_networks_and_a_text
from transformers import ResNetConfig, ResNetModel

from hf_guidance.analysis import Comparison
from hf_guidance.commands.comparing import table_of
from hf_guidance.commands.main import main


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Two networks with tokenizers, and a text."""
    return ["compare", *two_networks_and_a_text(tmp_path)]


def test_two_language_models_are_compared(texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *texts,
        "--output",
        str(tmp_path / "c.json"),
        "--sample_axis",
        "token",
        "--samples",
        "50",
        "--batch_size",
        "5",
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "debiased_cka, " in printed
    assert "in 10 batches, standard error at most" in printed
    found = Comparison.load(tmp_path / "c.json")
    assert f"{found.values[0, 0]:.3f}" in printed
    assert (tmp_path / "c.png").is_file()
    assert main([*texts, "--output", str(tmp_path / "d"), "--measure", "cka"]) == 1
    assert "Unknown measure 'cka'" in capsys.readouterr().err


def test_a_folder_that_is_not_there_yet_is_made_and_a_decoder_sees_the_text(texts: list[str], tmp_path: Path) -> None:
    t5().save_pretrained(tmp_path / "t5")
    tokenizer(tmp_path / "t5")
    place = tmp_path / "new" / "folder" / "c"
    assert main([*texts[:2], str(tmp_path / "t5"), *texts[3:], "--output", str(place)]) == 0
    assert Comparison.load(f"{place}.json").values.shape == (2, 2)


def test_networks_whose_images_are_not_known_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"depths": [1], "hidden_sizes": [8], "embedding_size": 8}
    for name, channels in (("colour", 3), ("grey", 1)):
        ResNetModel(ResNetConfig(num_channels=channels, **sizes)).save_pretrained(tmp_path / name)
    colour, grey = str(tmp_path / "colour"), str(tmp_path / "grey")
    assert main(["layers", colour, "--image_size", "32"]) == 0
    assert main(["compare", colour, colour, "--data", "digits", "--image_size", "32"]) == 1
    assert "comes without an image processor" in capsys.readouterr().err
    own = ["--untrained_a", "0", "--untrained_b", "1", "--data", "digits"]
    assert main(["compare", grey, grey, *own]) == 1
    assert "takes images of 1 channels, and the command makes those of 3" in capsys.readouterr().err


def test_two_image_networks_with_random_weights_are_compared(tmp_path: Path) -> None:
    words = [
        "compare",
        "timm/resnet18",
        "timm/resnet18",
        "--untrained_a",
        "0",
        "--untrained_b",
        "0",
        "--data",
        "digits",
    ]
    words += ["--samples", "40", "--image_size", "32", "--output", str(tmp_path / "c")]
    assert main(words) == 0
    np.testing.assert_allclose(Comparison.load(tmp_path / "c.json").values.diagonal(), 1, atol=1e-6)


def test_many_layers_are_printed_as_best_pairs() -> None:
    values = np.eye(3, 13)
    values[2] = np.nan
    found = Comparison(values, list("abc"), [f"l{i}" for i in range(13)], "linear_cka", "sequence", 9, 1)
    assert table_of(found).splitlines()[-3:] == ["a ~ l0  1.000", "b ~ l1  1.000", "c is constant"]


def test_what_cannot_be_compared_is_one_line(
    texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [*texts[:2], "timm/resnet18", "--untrained_b", "0", *texts[3:]]
    (tmp_path / "file").write_text("")
    for words, said in (
        (other, "takes text and timm/resnet18 images: two networks need the same data"),
        ([*texts, "--measure", "cka"], "Unknown measure 'cka'"),
        ([*texts, "--samples", "3"], "no batch of the data has the 4 samples"),
        ([*texts[:-1], str(tmp_path / "none.txt")], "none.txt"),
        ([*texts, "--output", str(tmp_path / "file" / "c")], "--output"),
        ([*texts, "--max_length", "0"], "--max_length is 0; it must be at least 1"),
        ([*texts, "--device", "nowhere"], "device is nowhere, which is not there"),
    ):
        assert main(words) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("hf-guidance compare: error: ")
        assert said in error
