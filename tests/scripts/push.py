"""Trains a guided target and pushes it, in a process whose Hub is a local one: push.py <folder> <what> [argument]."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from builders import VOCABULARY, token_rows
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from hf_guidance import GuidanceConfig, GuidanceTrainer, load_guide, load_guide_of
from hf_guidance.guide import rebuilding
from hf_guidance.guide.identity import fingerprint
from hf_guidance.targets import FCNConfig, FCNForImageClassification, RNNConfig, RNNForCausalLM
from hf_guidance.tasks.image_decoding import PixelFormat
from hf_guidance.tasks.images import image_processor


def measured_once():
    """Measure each untrained guide once, as every measurement takes a process of its own."""
    sizes, size_of = {}, rebuilding.size_of

    def known(config):
        key = json.dumps(config, sort_keys=True)
        if key not in sizes:
            sizes[key] = size_of(config)
        return sizes[key]

    rebuilding.size_of = known


def tokenizer():
    from tokenizers import Tokenizer, models

    words = {f"t{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")), pad_token="t0")


def trainer(folder, width=8, guide=None, **options):
    torch.manual_seed(0)
    arguments = {
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",  # so that a longer run passes through the states of a shorter one
        "per_device_train_batch_size": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "push_to_hub": True,
        "hub_model_id": "tester/guided-rnn",
        "hub_always_push": True,
    }
    target = RNNForCausalLM(RNNConfig(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=2))
    sizes = {"n_embd": 8, "n_layer": 3, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    guide = guide or load_guide(GPT2Config(vocab_size=VOCABULARY, **sizes), seed=5)
    return GuidanceTrainer(
        target,
        TrainingArguments(folder, **(arguments | options)),
        train_dataset=token_rows(),
        eval_dataset=token_rows(),
        guide=guide,
        guidance=GuidanceConfig(measure="ridge", sample_axis="token"),
        processing_class=tokenizer(),
    )


def image_trainer(folder, **options):
    rows = [{"pixel_values": torch.rand(3, 8, 8), "labels": i % 2} for i in range(8)]
    names = {"id2label": {0: "even", 1: "odd"}, "label2id": {"even": 0, "odd": 1}}
    target = FCNForImageClassification(FCNConfig(image_size=8, hidden_size=8, num_hidden_layers=2, **names))
    own = {
        "max_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
    }
    return GuidanceTrainer(
        target,
        TrainingArguments(folder, save_strategy="no", push_to_hub=True, **own, **options),
        train_dataset=rows,
        eval_dataset=rows,
        guide=load_guide("timm/test_resnet", untrained=True),
        guidance=GuidanceConfig(measure="ridge"),
        processing_class=image_processor(PixelFormat(8)),
    )


def tour(folder):
    """One process that pushes in every way; what each left is looked at from outside."""
    once, said = {"max_steps": 1, "save_strategy": "no"}, {}
    whole = {"max_steps": 2, "save_steps": 1, "hub_strategy": "all_checkpoints"}
    for name, options in {
        "private": {"hub_private_repo": True},
        "gated": {},
        "branches": {"hub_revision": "trial"},
    }.items():
        own = trainer(f"{folder}/{name}", hub_model_id=f"tester/{name}", **once, **options)
        own.train()
        for _ in range(2 if name == "private" else 1):  # once, and again
            own.push_to_hub()
        revision = options.get("hub_revision", "main")
        for token in (False, None):
            try:
                guide = load_guide_of(f"tester/{name}", token=token, revision=revision)
                target = RNNForCausalLM.from_pretrained(f"tester/{name}", token=token, revision=revision)
                same = fingerprint(guide) == fingerprint(own.guide) and fingerprint(target) == fingerprint(own.model)
                said[f"{name}, token {token}"] = "the same" if same else "another"
            except ValueError as error:
                said[f"{name}, token {token}"] = str(error)
    own = trainer(f"{folder}/all", hub_model_id="tester/all", **whole)
    own.train()
    first = RNNForCausalLM.from_pretrained("tester/private")
    guide = load_guide("tester/private")
    own = trainer(f"{folder}/chain", guide=guide, hub_model_id="tester/chain", **once)
    own.train()
    own.push_to_hub()
    prints = {fingerprint(network) for network in (guide, first.base_model, load_guide_of("tester/chain"))}
    said["chain"] = "the same" if len(prints) == 1 else "others"
    shutil.rmtree(Path(constants.HF_HUB_CACHE) / "models--tester--private")
    try:
        load_guide_of("tester/chain", token=False)
    except ValueError as error:
        said["chain, token False"] = str(error)
    own = trainer(f"{folder}/large", width=1100, hub_model_id="tester/large", **once)
    own.push_to_hub()
    loaded = RNNForCausalLM.from_pretrained("tester/large")
    said["large"] = "the same" if fingerprint(loaded) == fingerprint(own.model) else "another"
    own = image_trainer(f"{folder}/image", hub_model_id="tester/image")
    own.train()
    own.push_to_hub(dataset="a|b<script>", license="mit", tags=["x: y"])
    return said


def bad_day(folder):
    """One process whose pushes fail in every way; what the errors say."""
    said = {}
    once = {"hub_strategy": "end", "max_steps": 1, "save_strategy": "no"}
    for seed, name in enumerate(("500", "cut", "down", "401", "interrupted")):  # another seed makes other weights
        own = trainer(f"{folder}/{name}", hub_model_id=f"tester/{name}", seed=seed, **once)
        own.train()
        try:
            own.push_to_hub()
        except ConnectionError as error:
            said[name] = str(error)
    own.push_to_hub()  # the one that was interrupted
    own = trainer(f"{folder}/flaky", hub_model_id="tester/flaky")
    own.train()
    own.push_to_hub()
    said["flaky"] = own.state.global_step
    try:
        trainer(f"{folder}/flaky", hub_model_id="tester/flaky", hub_token="hf_reader")
    except PermissionError as error:
        said["reader"] = str(error)
    os.environ["HF_TOKEN"], token = "hf_wrong", os.environ["HF_TOKEN"]
    said["wrong token"] = refusal(f"{folder}/refused")
    os.environ["HF_TOKEN"], constants.HF_HUB_OFFLINE = token, True
    said["offline"] = refusal(f"{folder}/refused")
    return said


def refusal(folder):
    """Return the error of a trainer before it trains."""
    try:
        trainer(folder)
    except Exception as error:
        return f"{type(error).__name__} {error}"


def rows(folder):
    """Pushes a dataset, and reads it back at once and as a stream."""
    from datasets import Dataset, load_dataset

    from hf_guidance.card.facts import rows_facts

    Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 0]}).push_to_hub("tester/rows")
    whole = load_dataset("tester/rows", split="train")
    stream = load_dataset("tester/rows", split="train", streaming=True)
    return {"whole": list(whole), "stream": list(stream), "facts": rows_facts(whole)}


JUNK = ["nohup.out", "slurm-12.out", "id_rsa", "secret.json", "core.123", "optimizer.pt", "trackio/x.db"]
JUNK += ["other.safetensors", "old/config.json", "checkpoint-2/nohup.out", "checkpoint-2/optimizer_key.txt"]


def litter(folder):
    """Leaves in a folder what may lie in any: files of others, and links to what is outside."""
    outside = folder.parent / "outside"
    outside.mkdir()
    for path in [*(folder / name for name in JUNK), outside / "own.txt"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("PRIVATE")
    (folder / "checkpoint-2/global_step").symlink_to(outside)
    for name in ("notes.txt", "vocab.json", "checkpoint-2/merges.txt", "README.md", "tokenizer.json"):
        (folder / name).symlink_to(outside / "own.txt")
    for name in ("data", "_push", "_checkpoint-2"):
        (folder / name).symlink_to(outside)


def push(folder, strategy="every_save", token=None):
    litter(Path(folder))
    own = trainer(folder, hub_strategy=strategy, hub_token=token)
    own.processing_class.add_tokens(["/usr/bin", "</s>", "hf_" + 20 * "a"])
    own.model.config.data_folder, own.model.config.api_key = f"{folder}/data", "abc"
    own.model.generation_config.note = f"made by hf_{34 * 'b'} in {folder}"
    own.train()
    own.evaluate()
    own.push_to_hub(license="mit")
    return {"guide": fingerprint(own.guide), "loss": own.state.log_history[-1]["eval_loss"]}


def load(folder, repository):
    model = AutoModelForCausalLM.from_pretrained(repository).eval()
    rows = torch.stack([torch.as_tensor(row["input_ids"]) for row in token_rows()])
    own = trainer(f"{folder}/loaded", push_to_hub=False)
    own.model = own.model_wrapped = model
    return {"guide": fingerprint(load_guide_of(repository)), "loss": own.evaluate()["eval_loss"], "rows": len(rows)}


def resume(folder, repository):
    from huggingface_hub import snapshot_download

    checkpoint = snapshot_download(repository, allow_patterns="last-checkpoint/*") + "/last-checkpoint"
    own = trainer(f"{folder}/resumed", max_steps=6, push_to_hub=False)
    steps = []
    own.add_callback(Steps(steps))
    own.train(resume_from_checkpoint=checkpoint)
    return {"first": steps[0], "last": own.state.global_step, "weights": fingerprint(own.model)}


class Steps(TrainerCallback):
    """Keeps the step at the beginning of each."""

    def __init__(self, kept):
        self.kept = kept

    def on_step_begin(self, args, state, control, **kwargs):
        self.kept.append(state.global_step)


def unbroken(folder, repository):
    own = trainer(f"{folder}/unbroken", max_steps=6, push_to_hub=False)
    own.train()
    return {"weights": fingerprint(own.model)}


if __name__ == "__main__":
    place, what, *arguments = sys.argv[1:]  # several, joined by +, in one process
    measured_once()
    try:
        results = [globals()[name](place, *arguments) for name in what.split("+")]
        print("RESULT", json.dumps(results[0] if len(results) == 1 else results))
    except Exception as error:
        print("ERROR", type(error).__name__, error)
