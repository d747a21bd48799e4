"""The folder that a push uploads: what gets into it, and what is left alone."""

import os

import pytest

from hf_guidance.trainer.staging import files_in, make_empty, put, stage
from hf_guidance.trainer.uploads import of_model, stage_checkpoint


@pytest.fixture
def outside(tmp_path):
    place = tmp_path / "outside"
    place.mkdir()
    (place / "own.txt").write_text("PRIVATE")
    return place


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_links_are_neither_found_nor_followed_but_the_folder_itself_may_be_one(tmp_path, outside):
    folder = tmp_path / "real"
    write(folder, "config.json", "1_Pooling/config.json")
    (folder / "link.json").symlink_to(outside / "own.txt")
    (folder / "data").symlink_to(outside)
    os.mkfifo(folder / "pipe")
    (tmp_path / "out").symlink_to(folder)
    assert set(files_in(tmp_path / "out")) == {"config.json", "1_Pooling/config.json"}
    stage(["config.json", "link.json", "data/own.txt", "gone.json"], tmp_path / "out", tmp_path / "staged")
    assert set(files_in(tmp_path / "staged")) == {"config.json"}


def test_a_written_file_has_another_stamp(tmp_path):
    write(tmp_path, "a", "b")
    before = files_in(tmp_path)
    put(tmp_path / "b", tmp_path / "a")
    assert [name for name, stamp in files_in(tmp_path).items() if before[name] != stamp] == ["a", "b"]


def test_a_folder_is_emptied_and_a_link_in_its_place_is_removed_alone(tmp_path, outside):
    write(tmp_path / "staged", "a/b")
    assert not files_in(make_empty(tmp_path / "staged"))
    (tmp_path / "link").symlink_to(outside)
    assert not make_empty(tmp_path / "link").is_symlink()
    assert (outside / "own.txt").read_text() == "PRIVATE"


@pytest.mark.parametrize("link", [True, False])
def test_a_file_is_put_in_place_of_a_link_and_of_itself(link, tmp_path, outside):
    write(tmp_path, "a")
    (tmp_path / "b").symlink_to(outside / "own.txt")
    for _ in range(2):
        put(tmp_path / "a", tmp_path / "b", link=link)
    assert (tmp_path / "b").samefile(tmp_path / "a") == link
    assert (outside / "own.txt").read_text() == "PRIVATE"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "outside"}


def test_a_resumable_checkpoint_has_the_model_and_what_is_known_to_resume_it(tmp_path, outside):
    folder = tmp_path / "checkpoint-4"
    model = ["config.json", "model.safetensors", "guidance_config.json"]
    known = ["optimizer.pt", "rng_state_0.pth", "rng_state.json", "latest", "zero_to_fp32.py", "scheduler.pt"]
    known += ["global_step4/mp_rank_00_model_states.pt", "optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"]
    write(
        folder,
        *model,
        *known,
        "trainer_state.json",
        "training_args.bin",
        "nohup.out",
        "optimizer_key",
        "rng_state",
        "optimizer_1x/a",
        "global_step4/id_rsa",
    )
    (folder / "scaler.pt").symlink_to(outside / "own.txt")
    (folder / "global_step5").symlink_to(outside)
    assert of_model([*model, *known, "training_args.bin"]) == model
    stage_checkpoint(folder, model, make_empty(tmp_path / "whole"))
    assert set(files_in(tmp_path / "whole")) == {*model, *known, "trainer_state.json"}
