"""Results are written whole or not at all, and data are told apart by content."""

import hashlib
import json
from pathlib import Path

import pytest

from hf_guidance.experiments.files import identify_files, identify_folder, read_json, write_json


def test_a_file_that_cannot_be_written_to_its_end_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize("content", ["", '{"run": "alo', "[]", "[1, 2]", '"text"'])
def test_a_damaged_file_of_a_run_is_named_with_what_to_do(tmp_path: Path, content: str) -> None:
    path = tmp_path / "alone" / "result.json"
    write_json(path, {"run": "alone"})
    assert read_json(path) == {"run": "alone"}
    path.write_text(content)
    with pytest.raises(
        ValueError, match=rf"^{path} is damaged \(.*\)\. Remove {path.parent} to run it again, and the fol"
    ):
        read_json(path)


def test_files_and_folders_are_told_apart_by_content_and_not_by_place(tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place / "deep").mkdir(parents=True)
        (tmp_path / place / "deep" / "a.txt").write_text("text")
    paths = [str(tmp_path / place / "deep" / "a.txt") for place in ("one", "two")]
    expected = {"name": "a.txt", "sha256": hashlib.sha256(b"text").hexdigest()}
    assert identify_files(paths) == [expected, expected]
    folders = [identify_folder(str(tmp_path / place)) for place in ("one", "two")]
    assert folders[0] == folders[1]
    Path(paths[0]).write_text("longer text")
    assert identify_folder(str(tmp_path / "one")) != folders[1]
