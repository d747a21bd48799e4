"""Tiny trainers of TRL for the tests and scripts: a Llama of two layers, a tokenizer of 64 words, and data for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from builders import seeded
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from hf_guidance import GuidanceMixin, load_guide

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
WORDS = 60
CONFIG: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + WORDS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
NAMED = {"target_layers": ["model.layers.*"], "guide_layers": ["layers.*"]}


@dataclass(frozen=True)
class Case:
    """A Trainer of TRL and a way to use it.

    Args:
        trainer: Its name, without `Trainer`.
        settings: Arguments of its config.
        adapts: Whether it trains LoRA adapters, by `peft_config`.
        reference: Whether it is given a reference model.
    """

    trainer: str
    settings: dict[str, Any] = field(default_factory=dict)
    adapts: bool = False
    reference: bool = False


CASES = {
    "SFT": Case("SFT"),
    "SFT, packed": Case("SFT", {"packing": True, "max_length": 32}),
    "SFT, padding-free": Case("SFT", {"padding_free": True, "max_length": None}),
    "SFT, LoRA": Case("SFT", adapts=True),
    "DPO": Case("DPO"),
    "DPO, reference given": Case("DPO", reference=True),
    "DPO, reference precomputed": Case("DPO", {"precompute_ref_log_probs": True}),
    "DPO, LoRA": Case("DPO", adapts=True),
    "KTO": Case("KTO"),
    "KTO, LoRA": Case("KTO", adapts=True),
    "Reward": Case("Reward"),
    "Reward, LoRA": Case("Reward", adapts=True),
    "GRPO": Case("GRPO"),
    "GRPO, LoRA": Case("GRPO", adapts=True),
    "RLOO": Case("RLOO"),
    "RLOO, LoRA": Case("RLOO", adapts=True),
    "Distillation": Case("Distillation"),
    "Distillation, LoRA": Case("Distillation", adapts=True),
}
TRAINERS = tuple(dict.fromkeys(case.trainer for case in CASES.values()))
GENERATING: dict[str, dict[str, Any]] = {
    "GRPO": {"num_generations": 4, "max_completion_length": 5},
    "RLOO": {"num_generations": 4, "max_completion_length": 5},
    "Distillation": {"max_completion_length": 5},
}


def model_of(case: Case, folder: Path) -> Any:
    """A fresh target, the same each time, from a folder, because TRL makes its reference by the name of the target."""
    is_reward = case.trainer == "Reward"
    kind: Any = LlamaForSequenceClassification if is_reward else LlamaForCausalLM
    place = folder / kind.__name__
    if not place.is_dir():
        config = LlamaConfig(**CONFIG, **({"num_labels": 1} if is_reward else {}))
        seeded(lambda: kind(config), 0).save_pretrained(place)
    return kind.from_pretrained(place)


def guide_of() -> nn.Module:
    return load_guide(LlamaConfig(**CONFIG), seed=1)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*SPECIAL, *(f"w{i}" for i in range(WORDS))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def rows_of(case: Case, count: int = 32) -> Any:
    """Rows of random words, of other lengths, in the columns that a Trainer reads."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(WORDS, (length,), generator=generator).tolist())

    rows = []
    for i in range(count):
        prompt, chosen, rejected = text(4), " " + text(3 + i % 4), " " + text(3 + i % 3)
        rows.append(
            {
                "SFT": {"text": prompt + chosen},
                "DPO": {"prompt": prompt, "chosen": chosen, "rejected": rejected},
                "KTO": {"prompt": prompt, "completion": chosen, "label": i % 2 == 0},
                "Reward": {"prompt": prompt, "chosen": chosen, "rejected": rejected},
            }.get(case.trainer, {"prompt": prompt})
        )
    return Dataset.from_list(rows)


def different_words(completions: list[str], **kwargs: Any) -> list[float]:
    """The reward of what was generated: its number of different words."""
    return [float(len(set(completion.split()))) for completion in completions]


def make(case: Case, folder: Path, guided: bool = True, **changes: Any) -> Any:
    """A guided or plain trainer of three steps of eight examples; what is not a field of its config it is given."""
    import trl

    given = {name: changes.pop(name) for name in ("guidance", "guide", "train_dataset") if name in changes}
    settings = {"max_steps": 3, "per_device_train_batch_size": 8, "logging_steps": 1, "report_to": "none"}
    settings |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2}
    settings |= {**case.settings, **GENERATING.get(case.trainer, {}), **changes}
    kind: Any = getattr(trl, f"{case.trainer}Trainer")
    if guided:
        kind = type(f"Guided{kind.__name__}", (GuidanceMixin, kind), {})
        given.setdefault("guide", guide_of())
    if case.trainer in ("GRPO", "RLOO"):
        given["reward_funcs"] = different_words
    if case.trainer == "Distillation":
        given["teacher_model"] = seeded(lambda: LlamaForCausalLM(LlamaConfig(**CONFIG)), 2)
    if case.adapts:
        from peft import LoraConfig

        kinds = {"task_type": "SEQ_CLS"} if case.trainer == "Reward" else {"task_type": "CAUSAL_LM"}
        given["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **kinds)
    if case.reference:
        given["ref_model"] = model_of(case, folder)
    given.setdefault("train_dataset", rows_of(case))
    torch.manual_seed(0)  # of the adapters
    args = getattr(trl, f"{case.trainer}Config")(str(folder / "out"), **settings)
    return kind(model=model_of(case, folder), args=args, processing_class=tokenizer(), **given)
