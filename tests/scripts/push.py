"""Trains a guided target and pushes it, in a process whose Hub is a local one: push.py <folder> <what> [argument]."""

import json
import sys

import torch
from builders import VOCABULARY, token_rows
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast, TrainingArguments

from hf_guidance import GuidanceConfig, GuidanceTrainer, load_guide, load_guide_of
from hf_guidance.identity import fingerprint
from hf_guidance.targets import RNNConfig, RNNForCausalLM


def tokenizer():
    from tokenizers import Tokenizer, models

    words = {f"t{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")), pad_token="t0")


def trainer(folder, **options):
    torch.manual_seed(0)
    arguments = {
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "push_to_hub": True,
        "hub_model_id": "tester/guided-rnn",
        "hub_always_push": True,
    }
    target = RNNForCausalLM(RNNConfig(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2))
    sizes = {"n_embd": 8, "n_layer": 3, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    guide = load_guide(GPT2Config(vocab_size=VOCABULARY, **sizes), seed=5)
    return GuidanceTrainer(
        target,
        TrainingArguments(folder, **(arguments | options)),
        train_dataset=token_rows(),
        eval_dataset=token_rows(),
        guide=guide,
        guidance=GuidanceConfig(measure="ridge", sample_axis="token"),
        processing_class=tokenizer(),
    )


def push(folder, strategy="every_save", token=None):
    own = trainer(folder, hub_strategy=strategy, hub_token=token)
    own.train()
    own.evaluate()
    own.push_to_hub(license="mit")
    return {"guide": fingerprint(own.guide), "loss": own.state.log_history[-1]["eval_loss"]}


def load(folder, repository):
    model = AutoModelForCausalLM.from_pretrained(repository).eval()
    rows = torch.stack([torch.as_tensor(row["input_ids"]) for row in token_rows()])
    own = trainer(folder, push_to_hub=False)
    own.model = own.model_wrapped = model
    return {"guide": fingerprint(load_guide_of(repository)), "loss": own.evaluate()["eval_loss"], "rows": len(rows)}


def resume(folder, repository):
    from huggingface_hub import snapshot_download

    checkpoint = snapshot_download(repository, allow_patterns="last-checkpoint/*") + "/last-checkpoint"
    own = trainer(folder, max_steps=6, push_to_hub=False)
    own.train(resume_from_checkpoint=checkpoint)
    return {"step": own.state.global_step}


if __name__ == "__main__":
    place, what, *arguments = sys.argv[1:]
    try:
        print("RESULT", json.dumps(globals()[what](place, *arguments)))
    except Exception as error:
        print("ERROR", type(error).__name__, error)
