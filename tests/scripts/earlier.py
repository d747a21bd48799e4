"""Writes what this version leaves behind, for later ones to load: earlier.py <folder>.

A guided run with its checkpoint, guide and cache, the same as it would be pushed, and a recipe's results. What
`tests/earlier/` holds was written by version 0.1.0 as it was before the package had rooms.
"""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2Model, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))

from builders import VOCABULARY, token_rows

from hf_guidance import GuidanceConfig, GuidanceTrainer, load_guide
from hf_guidance.targets import RNNConfig, RNNForCausalLM

SIZES = {"n_embd": 4, "n_layer": 2, "n_head": 1, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
CACHED = {"cache_guide": "cache", "sample_id_column": "id", "sketch": 8}
RECIPE = [
    *("--runs", "alone", "untrained_guide", "--max_steps", "2", "--eval_steps", "1", "--logging_steps", "1"),
    *("--per_device_train_batch_size", "8", "--eval_size", "8", "--max_tokens", "32", "--use_cpu", "--output_dir"),
]


def guided(folder: Path, guide: torch.nn.Module, steps: int, **guidance: object) -> GuidanceTrainer:
    """A trainer of a tiny recurrent network, which saves at its second step."""
    torch.manual_seed(0)
    rows = [{**row, "id": torch.tensor(i)} for i, row in enumerate(token_rows(8))]
    args = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, logging_steps=1, per_device_train_batch_size=8, use_cpu=True,
        report_to="none", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    target = RNNForCausalLM(RNNConfig(vocab_size=VOCABULARY, hidden_size=4, num_hidden_layers=2))
    config = GuidanceConfig(**guidance)  # type: ignore[arg-type]
    return GuidanceTrainer(target, args, train_dataset=rows, guide=guide, guidance=config)


def main(folder: Path) -> None:
    """Write everything into a folder that is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(1)
    GPT2Model(GPT2Config(vocab_size=VOCABULARY, **SIZES)).save_pretrained(folder / "guide")
    trainer = guided(folder / "run", load_guide(folder / "guide"), 2, measure="debiased_cka")
    trainer.train()
    cached = guided(
        folder / "cached", load_guide(folder / "guide"), 2, **CACHED | {"cache_guide": str(folder / "cache")}
    )
    cached.train()
    pushed = guided(folder / "pushed", load_guide(GPT2Config(vocab_size=VOCABULARY, **SIZES), seed=3), 1)
    pushed.train()
    pushed.save_model()
    pushed.create_model_card(license="mit")
    for gone in ("cached", *(f"pushed/{path.name}" for path in (folder / "pushed").glob("checkpoint-*"))):
        shutil.rmtree(folder / gone)
    sys.argv = ["rnn_vs_transformer.py", *RECIPE, str(folder / "recipe")]
    runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "rnn_vs_transformer.py"), run_name="__main__")
    for path in [*folder.glob("recipe/**/*"), folder / "pushed" / "curves.png", folder / "cache" / "create.lock"]:
        if path.is_file() and path.suffix not in (".json", ".md"):
            path.unlink()
        elif path.name.startswith("checkpoint-"):
            shutil.rmtree(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
