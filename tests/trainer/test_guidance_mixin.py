"""`GuidanceMixin` in front of other Trainers: a loss of its own, Seq2SeqTrainer, and the signature that is shown."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import arguments, cka, gpt2, guidance_by_hand, hidden_states, linear, llama, seeded, t5, token_rows
from torch import nn
from trainers import SGD, batches_of, descend, trained, weights
from transformers import GPT2LMHeadModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from hf_guidance import GuidanceTrainer
from hf_guidance.trainer.guidance_mixin import GuidanceMixin


class Doubling(Trainer):
    """Someone's Trainer with a loss of its own: a mean over the batch, times two."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        return (2 * outputs.loss, outputs) if return_outputs else 2 * outputs.loss


class GuidedDoubling(GuidanceMixin, Doubling):
    pass


def test_the_mixin_guides_another_trainer_with_a_loss_of_its_own(tmp_path: Path) -> None:
    target, guide = gpt2(), llama()
    batches, copy = batches_of(target), gpt2()
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=1, **SGD)
    trainer = GuidedDoubling(model=target, guide=guide, guidance=linear(), args=args, train_dataset=token_rows())
    if not hasattr(Trainer, "loss_is_scaled_for_ga"):
        trainer.model_accepts_loss_kwargs = False  # as one said it to earlier Trainers
    (log,) = trained(trainer)[1]
    task = [2 * copy(**batch).loss for batch in batches]
    guidance = [guidance_by_hand(copy, guide, batch) for batch in batches]
    assert log["task/loss"] == pytest.approx(torch.stack(task).mean().item(), rel=1e-5)
    assert log["loss"] == pytest.approx(log["task/loss"] + log["guidance/loss"], rel=1e-5)
    pairs = [value for name, value in log.items() if name.startswith("guidance/similarity/")]
    assert len(pairs) > 1
    assert log["guidance/similarity"] == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    descend(copy, (sum(task) + sum(guidance)) / 2)
    torch.testing.assert_close(weights(target), weights(copy), rtol=1e-4, atol=1e-6)


class GuidedSeq2Seq(GuidanceMixin, Seq2SeqTrainer):
    pass


def test_the_mixin_guides_a_seq2seq_trainer(tmp_path: Path) -> None:
    target, guide, data = t5(0), t5(1), token_rows(8)
    batches, copy = batches_of(target), t5(0)
    args = Seq2SeqTrainingArguments(**{**arguments(tmp_path).to_dict(), "max_steps": 2, "predict_with_generate": True})
    trainer = GuidedSeq2Seq(
        model=target, guide=guide, guidance=linear(), args=args, train_dataset=data, eval_dataset=data
    )
    logs = trained(trainer)[1]
    ids = batches[0]["input_ids"]
    shifted = torch.cat([torch.zeros(4, 1, dtype=torch.long), batches[0]["labels"][:, :-1]], 1)
    inputs = {"input_ids": ids, "decoder_input_ids": shifted}
    ours, theirs = hidden_states(copy, inputs), hidden_states(guide, inputs)
    expected = sum(1 - cka(ours[i], theirs[i]).item() for i in (0, 1))
    assert logs[0]["guidance/loss"] == pytest.approx(expected, abs=1e-5)
    generated = trainer.predict(data).predictions
    assert len(generated) == 8
    assert generated.dtype == "int64"


def test_a_seq2seq_trainer_takes_named_modules_and_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "v"])
    target = seeded(lambda: peft.get_peft_model(t5(), adapters), 0)
    args = Seq2SeqTrainingArguments(**arguments(tmp_path).to_dict())
    guidance = linear(target_layers=["decoder.block.*"], guide_layers=["decoder.block.*"], log_measures=[])
    trainer = GuidedSeq2Seq(target, args, train_dataset=token_rows(), guide=t5(seed=1), guidance=guidance)
    before = weights(target)
    logs = trained(trainer)[1]
    pairs = {f"guidance/similarity/decoder.block.{i}~decoder.block.{i}" for i in (0, 1)}
    assert all({name for name in log if name.count("/") > 1} == pairs for log in logs)
    moved = {name for name, value in weights(target).items() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_the_signature_is_the_trainers_with_guide_and_guidance() -> None:
    assert list(inspect.signature(GuidedDoubling).parameters)[:2] == ["model", "args"]
    for kind in (GuidedDoubling, GuidedSeq2Seq):
        assert {"guide", "guidance"} <= set(inspect.signature(kind).parameters)


def test_a_class_in_place_of_a_network_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model is the class GPT2LMHeadModel; expected a network: make one of it"):
        GuidanceTrainer(GPT2LMHeadModel, arguments(tmp_path), guide=llama())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="guide is the class GPT2LMHeadModel; expected a network: make one of it"):
        GuidanceTrainer(gpt2(), arguments(tmp_path), guide=GPT2LMHeadModel)  # type: ignore[arg-type]
