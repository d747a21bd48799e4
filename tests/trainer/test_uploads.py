"""Uploads of other Trainers and models, without a Hub: what a push takes along."""

import json
import shlex
from pathlib import Path

import pytest
from builders import arguments, gpt2, llama, token_rows
from transformers import Trainer

from hf_guidance import GuidanceConfig, GuidanceMixin
from hf_guidance.trainer.staging import files_in
from hf_guidance.trainer.uploads import upload_command


class PoolingTrainer(Trainer):
    """Saves files of its own into sub-folders, as that of sentence-transformers does."""

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        place = Path(output_dir or self.args.output_dir)
        (place / "1_Pooling").mkdir(exist_ok=True)
        for name in ("modules.json", "1_Pooling/config.json"):
            (place / name).write_text("{}")


class Guided(GuidanceMixin, PoolingTrainer):
    """With guidance."""


def trainer(folder, model=None, guide=True, **options):
    options = {"push_to_hub": True, "hub_model_id": "me/net", "save_strategy": "steps", "save_steps": 1} | options
    guidance = GuidanceConfig(sample_axis="token", guidance_weight=float(guide))
    args = arguments(folder, max_steps=2, hub_always_push=True, **options)
    own = {"train_dataset": token_rows(), "guide": llama() if guide else None, "guidance": guidance}
    return Guided(model or gpt2(), args, **own)


def test_files_that_another_trainer_saves_are_pushed_and_nothing_else_and_the_output_folder_may_be_a_link(
    tmp_path, uploads
):
    (tmp_path / "real" / "1_Pooling").mkdir(parents=True)
    (tmp_path / "real" / "1_Pooling" / "notes.txt").write_text("PRIVATE")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    own = trainer(tmp_path / "out")
    own.train()
    own.push_to_hub()
    model = {"config.json", "generation_config.json", "model.safetensors", "modules.json", "1_Pooling/config.json"}
    assert [title for title, _ in uploads] == [*(f"Training in progress, step {i}" for i in (1, 2)), "End of training"]
    for _, contents in uploads:
        assert set(contents) - {"curves.png"} == model | {"README.md", "guidance_config.json"}
    assert {name for name in files_in(tmp_path / "real") if not name.startswith("checkpoint")} >= model


def test_every_push_renders_one_card_and_makes_one_commit(tmp_path, uploads, monkeypatch):
    rendered = []
    monkeypatch.setattr("hf_guidance.trainer.card_mixin.render", lambda facts: rendered.append(facts) or "---\n---\n")
    own = trainer(tmp_path / "out")
    own.train()
    assert (len(rendered), len(uploads)) == (2, 2)  # one at each of two checkpoints
    own.push_to_hub()
    assert (len(rendered), len(uploads)) == (3, 3)
    own.save_model()
    assert (len(rendered), len(uploads)) == (4, 4)


def test_what_is_saved_into_the_output_folder_later_changes_no_checkpoint(tmp_path, uploads):
    own = trainer(tmp_path / "out")
    own.train()
    weights = tmp_path / "out/checkpoint-2/model.safetensors"
    before = weights.read_bytes()
    own.push_to_hub()
    own.model.lm_head.weight.data.add_(1)
    own.save_model(_internal_call=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() != before
    assert weights.read_bytes() == before


def test_an_adapter_is_pushed_without_the_path_of_its_base(tmp_path, uploads):
    peft = pytest.importorskip("peft")
    base = gpt2()
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    own = trainer(tmp_path / "out", peft.get_peft_model(base, config), guide=False, hub_strategy="checkpoint")
    own.train()
    own.push_to_hub()
    for title, contents in uploads:
        assert json.loads(contents["adapter_config.json"])["base_model_name_or_path"] == "base"
        texts = [content for name, content in contents.items() if name.endswith((".json", ".md"))]
        assert str(tmp_path).encode() not in b"".join(texts)
        assert ("README.md" in contents) == (not title.endswith(", checkpoint"))
        assert ("optimizer.pt" in contents) == title.endswith(", checkpoint")
    kept = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert kept["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize("blocking", [True, False])
def test_the_staged_folder_is_removed_when_it_has_arrived_and_stays_when_it_has_not(blocking, tmp_path, uploads):
    own = trainer(tmp_path / "out", save_strategy="no")
    done = own.push_to_hub(blocking=blocking)
    own._finish_current_push()
    assert (done if blocking else done.result()).repo_url == "https://hub.test/me/net"
    assert not (tmp_path / "out/_push").exists()
    with pytest.raises(OSError, match="no Hub today"):
        own.push_to_hub("fail", blocking=blocking).result()
    assert set(files_in(tmp_path / "out/_push")) >= {"config.json", "model.safetensors", "README.md"}
    assert "training_args.bin" not in files_in(tmp_path / "out/_push")


def test_the_command_to_push_later_quotes_its_folder_and_keeps_the_revision(tmp_path):
    words = shlex.split(upload_command("me/net", tmp_path / "my run; ls", "trial"))
    assert words == ["hf", "upload", "me/net", str(tmp_path / "my run; ls"), ".", "--revision", "trial"]
    assert upload_command("me/net", tmp_path, private=True).endswith(" . --private")
