"""Every target through transformers' Auto classes, with the package and without it, and through a Trainer."""

import os
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

from hf_guidance import targets
from hf_guidance.targets import FCNConfig, PlainResNetConfig, RNNConfig

torch.set_num_threads(1)
VOCAB = 11
SMALL = {
    "RNN": RNNConfig(
        vocab_size=VOCAB, embedding_size=6, hidden_size=8, num_hidden_layers=3, cell_type="gru", pad_token_id=0
    ),
    "FCN": FCNConfig(image_size=8, hidden_size=6, num_hidden_layers=4, num_labels=3),
    "PlainResNet": PlainResNetConfig(embedding_size=4, hidden_sizes=[8, 16], depths=[1, 2], num_labels=3),
}
AUTO = {
    "RNNModel": "AutoModel",
    "RNNForCausalLM": "AutoModelForCausalLM",
    "RNNForSequenceClassification": "AutoModelForSequenceClassification",
    "FCNModel": "AutoModel",
    "FCNForImageClassification": "AutoModelForImageClassification",
    "PlainResNetModel": "AutoModel",
    "PlainResNetForImageClassification": "AutoModelForImageClassification",
}
with_a_loss = [name for name in AUTO if "For" in name]
ELSEWHERE = """
import sys
sys.modules["hf_guidance"] = None  # any import of the package raises
import torch, transformers
for name, auto in zip(sys.argv[1::2], sys.argv[2::2]):
    inputs = torch.load(f"{name}-inputs.pt")
    model = getattr(transformers, auto).from_pretrained(name, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    torch.save(model(**inputs)[0], f"{name}.pt")
    if auto == "AutoModelForCausalLM":
        torch.save(model.generate(**inputs, max_new_tokens=4, do_sample=False), "generated.pt")
"""


def build(name):
    torch.manual_seed(0)
    return getattr(targets, name)(SMALL[name.split("Model")[0].split("For")[0]]).eval()


def inputs_of(name, rows=5):
    generator = torch.Generator().manual_seed(1)
    if not name.startswith("RNN"):
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    ids = torch.randint(1, VOCAB, (rows, 6), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(6) >= torch.arange(rows)[:, None]) * 1}


def labels_of(name, inputs):
    rows = len(next(iter(inputs.values())))
    return inputs["input_ids"] if name == "RNNForCausalLM" else torch.arange(rows) % (2 if "RNN" in name else 3)


def test_every_exported_model_is_among_these():
    assert set(AUTO) == {name for name in targets.__all__ if name.endswith("Model") or "For" in name}


@pytest.mark.parametrize("name", AUTO)
def test_auto_classes_load_a_saved_model_with_the_package(name, tmp_path):
    model, inputs = build(name), inputs_of(name)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = getattr(transformers, AUTO[name]).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded(**inputs)[0], model(**inputs)[0], atol=1e-6, rtol=0)


def test_auto_classes_load_a_saved_model_without_the_package(tmp_path):
    models = {name: build(name) for name in AUTO}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        torch.save(inputs_of(name), tmp_path / f"{name}-inputs.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-I", "-c", ELSEWHERE, *(word for pair in AUTO.items() for word in pair)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    for name, model in models.items():
        expected = model(**inputs_of(name))[0]
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), expected, atol=1e-6, rtol=0)
    inputs = inputs_of("RNNForCausalLM")
    generated = models["RNNForCausalLM"].generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(torch.load(tmp_path / "generated.pt"), generated)


@pytest.mark.parametrize("name", with_a_loss)
def test_a_trainer_steps_evaluates_and_saves_the_code_with_the_weights(name, tmp_path):
    inputs = inputs_of(name, 4)
    batch = {**inputs, "labels": labels_of(name, inputs)}
    rows = [{key: value[row] for key, value in batch.items()} for row in range(4)]
    model = build(name)
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    changed = [key for key, parameter in model.named_parameters() if not torch.equal(before[key], parameter)]
    assert changed == list(before)
    assert trainer.predict(rows).predictions.shape == tuple(build(name)(**inputs).logits.shape)
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()
    assert (tmp_path / "checkpoint-1" / f"modeling_{model.config.model_type}.py").is_file()


@pytest.mark.parametrize("name", [name for name in with_a_loss if "Image" in name])
def test_the_loss_of_a_vision_target_is_divided_under_accumulation(name, tmp_path):
    inputs = inputs_of(name, 16)
    rows = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(inputs["pixel_values"])]
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 1}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    trainer = Trainer(build(name), TrainingArguments(str(tmp_path), **sizes, **quiet), train_dataset=rows)
    assert not trainer.model_accepts_loss_kwargs
    trainer.train()
    assert trainer.state.log_history[0]["loss"] < 2  # ln 3, not four times as much


@pytest.mark.parametrize("name", [name for name in with_a_loss if "Image" in name])
def test_bfloat16_autocast_trains(name):
    model, inputs = build(name).train(), inputs_of(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs, labels=labels_of(name, inputs)).loss
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
