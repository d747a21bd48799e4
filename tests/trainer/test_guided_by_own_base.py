"""Trainers whose guide is the target's own base: runs, checkpoints, cards, and the guide of what was pushed."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import gpt2, seeded
from cards import check_card
from torch import nn
from trainers import make_trainer, same, train_logs, trained, weights

from hf_guidance import GuidanceConfig, load_guide_of
from hf_guidance.guide.identity import fingerprint

SAVING = {"save_strategy": "steps", "save_steps": 1}


def base(dropout: float = 0.2) -> nn.Module:
    return gpt2(seed=3, dropout=dropout)


def adapted(network: nn.Module | None = None, **changes: Any) -> Any:
    settings = {"target_modules": ["c_attn"], "r": 2, "lora_dropout": 0.2, "fan_in_fan_out": True, **changes}
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    return seeded(lambda: peft.get_peft_model(network or base(), config), 0)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"bf16": True},
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "named layers": {"target_layers": ["transformer.h.*"], "guide_layers": ["transformer.h.*"]},
    "accumulated": {"gradient_accumulation_steps": 2, "similarity_batch": "accumulated"},
    "validated": {"eval_strategy": "steps", "eval_steps": 1, "eval_similarity": True},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_run_is_that_with_a_frozen_copy_of_the_base(case: str, tmp_path: Path) -> None:
    settings = dict(SETTINGS[case])
    if "eval_strategy" in settings:
        from builders import token_rows

        settings["eval_dataset"] = token_rows(8, seed=1)
    target, kept = adapted(), weights(adapted())
    trainer = make_trainer(tmp_path, target, "base", **settings)
    after, logs = trained(trainer)
    expected, expected_logs = trained(make_trainer(tmp_path, adapted(), base(), **settings))
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)
    for log, other in zip(logs, expected_logs, strict=True):
        assert log["guidance/loss"] == pytest.approx(other["guidance/loss"], abs=1e-6)
    assert logs[0]["guidance/loss"] > 1e-4
    assert {name for name in after if not torch.equal(kept[name], after[name])} == {n for n in after if "lora_" in n}
    assert fingerprint(trainer.guide) == trainer.guide_identity["fingerprint"] == fingerprint(base())


def test_weight_0_is_plain_training_and_the_base_is_not_run_by_itself(tmp_path: Path) -> None:
    one, other = adapted(), adapted()
    expected, logs = trained(make_trainer(tmp_path, other, None))
    trainer = make_trainer(tmp_path, one, "base", guidance_weight=0.0)
    trainer.guide.forward = lambda *args, **kwargs: pytest.fail("the guide ran")
    got, found = trained(trainer)
    assert same(got, expected)
    assert [log["loss"] for log in found] == [log["loss"] for log in logs]


def test_a_resumed_run_ends_with_the_same_weights_and_has_the_same_guide(tmp_path: Path) -> None:
    whole, logs = trained(make_trainer(tmp_path / "whole", adapted(), "base", **SAVING))
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "part" / "checkpoint-1")
    trainer = make_trainer(tmp_path / "part", adapted(), "base", **SAVING)
    resumed, _ = trained(trainer, resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-1"))
    assert same(resumed, whole)
    assert [log["guidance/loss"] for log in train_logs(trainer)][1:] == [log["guidance/loss"] for log in logs][1:]
    other = make_trainer(tmp_path / "part", adapted(gpt2(seed=4)), "base", **SAVING)
    words = r"checkpoint-1 was guided by GPT2LMHeadModel \(live module, the target's own base, sha256.* trainer's guide"
    with pytest.raises(ValueError, match=words):
        other.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-1"))


def test_a_checkpoint_holds_the_adapter_alone_and_says_what_the_guide_was(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, adapted(), "base", **SAVING)
    trainer.train()
    names = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    guide = GuidanceConfig.load(tmp_path / "checkpoint-3")[1]
    assert guide["own_base"] is True
    assert guide["fingerprint"] == fingerprint(base())
    assert guide["architecture"] == "GPT2LMHeadModel"
    with pytest.raises(
        ValueError, match=r"was the target's own base, a network that was loaded from nowhere, which is not"
    ):
        load_guide_of(tmp_path / "checkpoint-3")


def test_the_card_says_that_the_guide_is_the_targets_own_base(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "my-base")
    network = type(base()).from_pretrained(tmp_path / "my-base")
    network.loss_type = "ForCausalLM"
    trainer = make_trainer(tmp_path / "run", adapted(network), "base")
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text()
    check_card(text)
    words = " ".join(text.split())
    assert "by its own base, a GPT2LMHeadModel without the adapters: each pair of layers, one with and one" in words
    assert "the target's own without its adapters: my-base" in words
    assert fingerprint(base()) in text
    assert str(tmp_path) not in text
    trainer.save_model()
    with pytest.raises(ValueError, match=r"own base, a local folder or network called 'my-base', which is not stored"):
        load_guide_of(tmp_path / "run")


def test_the_guide_of_such_a_target_is_rebuilt_from_the_base_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_guidance.guide import rebuilding

    network = base()
    network.save_pretrained(tmp_path / "hub")
    network.config._name_or_path, network.config._commit_hash = "me/base", "abc"
    trainer = make_trainer(tmp_path / "run", adapted(network), "base")
    trainer.save_model()
    asked: list[tuple[str, str | None]] = []
    load = rebuilding.load_guide

    def from_folder(source: str, revision: str | None = None, **options: Any) -> nn.Module:
        asked.append((source, revision))
        return load(tmp_path / "hub", **options)

    monkeypatch.setattr(rebuilding, "load_guide", from_folder)
    rebuilt = load_guide_of(tmp_path / "run")
    assert asked == [("me/base", "abc")]
    assert fingerprint(rebuilt) == fingerprint(base())
    assert not any(weight.requires_grad for weight in rebuilt.parameters())
    path = tmp_path / "run" / "guidance_config.json"
    content = json.loads(path.read_text())
    content["guide"]["architecture"] = "Trainer"
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"own base, a 'Trainer', which is no network of transformers or of this package"
    ):
        load_guide_of(tmp_path / "run")


def test_a_model_made_anew_for_each_run_has_the_guide_of_its_own(tmp_path: Path) -> None:
    made: list[Any] = []
    trainer = make_trainer(tmp_path, None, "base", model_init=lambda: made.append(adapted()) or made[-1])
    first = trainer.guide
    trainer.train()
    assert len(made) > 1
    assert trainer.guide is not first
    assert trainer.guide.is_of(trainer.model)
    assert trainer.guide_identity["fingerprint"] == fingerprint(base())


def test_a_target_without_adapters_or_with_a_base_in_training_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the target \(GPT2LMHeadModel\) has no layers with adapters"):
        make_trainer(tmp_path, gpt2(), "base")
    with pytest.raises(ValueError, match="save_guide=True needs a guide with weights of its own"):
        make_trainer(tmp_path, adapted(), "base", save_guide=True)
    trainer = make_trainer(tmp_path, target := adapted(), "base")
    target.get_base_model().transformer.wpe.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 of its weights are trained \(transformer\.wpe\.weight\)"):
        trainer.train()
    with pytest.raises(ValueError, match=r"guide is 'gpt2'; expected a network: use load_guide\('gpt2'\)"):
        make_trainer(tmp_path, adapted(), "gpt2")


def test_weights_that_are_sharded_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_guidance.trainer.checks.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"guide='base' runs the target's own weights.*FSDP and DeepSpeed ZeRO-3.*DDP"):
        make_trainer(tmp_path, adapted(), "base")


def test_a_map_of_all_layers_is_computed_of_a_copy(tmp_path: Path) -> None:
    from builders import token_batch

    from hf_guidance.analysis.similarity_map import similarity_map

    trainer = make_trainer(tmp_path, adapted(), "base")
    before = weights(trainer.model)
    own = similarity_map(trainer.model, trainer.guide, trainer.guidance, token_batch())
    other = similarity_map(trainer.model, copy.deepcopy(base()).eval(), trainer.guidance, token_batch())
    assert own == other
    assert same(before, weights(trainer.model))
