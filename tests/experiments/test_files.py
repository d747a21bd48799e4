"""Results are written whole or not at all."""

import json
from pathlib import Path

import pytest

from hf_guidance.experiments.files import check_writable, write_json


def test_a_file_that_cannot_be_written_to_its_end_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_a_folder_is_made_and_one_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--output_dir .*file/b cannot be written \(Not a directory\): name another"):
        check_writable(tmp_path / "file" / "b")
