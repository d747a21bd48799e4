"""Vision targets against other people's code: values, initial weights, files, errors."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments

from hf_guidance.targets import (
    FCNConfig,
    FCNForImageClassification,
    FCNModel,
    PlainResNetConfig,
    PlainResNetForImageClassification,
    PlainResNetModel,
)

torch.set_num_threads(1)
SMALL = {
    FCNForImageClassification: FCNConfig(image_size=8, hidden_size=6, num_hidden_layers=4, num_labels=3),
    PlainResNetForImageClassification: PlainResNetConfig(
        embedding_size=4, hidden_sizes=[8, 16], depths=[1, 2], num_labels=3
    ),
}
both = pytest.mark.parametrize("model_class", SMALL)


def build(model_class, seed=0):
    torch.manual_seed(seed)
    return model_class(SMALL[model_class]).eval()


def images(size=8, batch=5):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_the_fcn_is_linear_norm_relu_on_flattened_pixels():
    model, pixels = build(FCNForImageClassification), images()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm1d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    expected = [pixels.double().numpy().reshape(5, -1)]
    for i in range(4):
        part = {name.split(f"blocks.{i}.")[1]: v for name, v in state.items() if f"blocks.{i}." in name}
        z = expected[-1] @ part["linear.weight"].T + part["linear.bias"]
        z = (z - part["norm.running_mean"]) / np.sqrt(part["norm.running_var"] + 1e-5)
        expected.append(np.maximum(z * part["norm.weight"] + part["norm.bias"], 0))
    outputs = model(pixels, output_hidden_states=True)
    assert len(outputs.hidden_states) == 5
    for ours, theirs in zip(outputs.hidden_states, expected, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, atol=1e-5)
    logits = expected[-1] @ state["classifier.weight"].T + state["classifier.bias"]
    np.testing.assert_allclose(outputs.logits.detach().numpy(), logits, atol=1e-5)


def test_dropout_is_behind_the_relu_and_batch_norm_can_be_left_out():
    config = FCNConfig(image_size=4, hidden_size=2000, num_hidden_layers=1, hidden_dropout_prob=0.25, batch_norm=False)
    model = FCNModel(config).train()
    hidden = model(images(4)).last_hidden_state
    zero = (model.eval()(images(4)).last_hidden_state > 0) & (hidden == 0)
    assert zero.sum() / (zero | (hidden > 0)).sum() == pytest.approx(0.25, abs=0.03)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_the_plain_resnet_is_torchvisions_without_its_skips(depth):
    reference = getattr(torchvision.models, f"resnet{depth}")(num_classes=7)
    model = PlainResNetForImageClassification(PlainResNetConfig.of_depth(depth, num_labels=7))
    ours = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    named = [(n, m) for n, m in reference.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    theirs = [m for n, m in named if "downsample" not in n]
    stem = reference.conv1, reference.bn1
    blocks = [block for stage in range(1, 5) for block in getattr(reference, f"layer{stage}")]
    ordered = [
        *stem,
        *(getattr(b, f"{k}{i}") for b in blocks for i in (1, 2, 3) for k in ("conv", "bn") if hasattr(b, f"{k}{i}")),
    ]
    ordered.append(reference.fc)
    assert len(ours) == len(theirs) == len(ordered)
    model.train(), reference.train()
    for mine, other in zip(ours, ordered, strict=True):
        mine.load_state_dict(other.state_dict())
    hidden = pixels = images(64, 4)
    hidden = expected = reference.maxpool(reference.bn1(reference.conv1(pixels)).relu())
    states = [expected]
    for block in blocks:
        for i in (1, 2, 3):
            if hasattr(block, f"conv{i}"):
                hidden = getattr(block, f"bn{i}")(getattr(block, f"conv{i}")(hidden)).relu()
        states.append(hidden)
    outputs = model(pixels, output_hidden_states=True)
    assert len(outputs.hidden_states) == len(states) == 1 + len(blocks)
    for mine, other in zip(outputs.hidden_states, states, strict=True):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(outputs.logits, reference.fc(reference.avgpool(hidden).flatten(1)))


def test_initial_weights_are_torchs_own_linear_and_he_et_als_convolution():
    torch.manual_seed(0)
    linear = FCNModel(FCNConfig(image_size=16, hidden_size=300, num_hidden_layers=2)).blocks[1].linear
    assert linear.weight.detach().abs().max() == pytest.approx(300**-0.5, rel=1e-3)
    assert linear.weight.detach().std() == pytest.approx((3 * 300) ** -0.5, rel=0.02)
    model = PlainResNetModel(PlainResNetConfig.of_depth(18))
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        fan_out = conv.out_channels * math.prod(conv.kernel_size)
        assert conv.weight.detach().std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_named_sizes_are_the_papers():
    deep, wide = FCNConfig.deep(), FCNConfig.wide(image_size=32)
    assert (deep.num_hidden_layers, deep.hidden_size, deep.image_size) == (50, 2048, 224)
    assert (wide.num_hidden_layers, wide.hidden_size, wide.image_size) == (3, 8192, 32)


AUTO = {FCNModel: AutoModel, PlainResNetModel: AutoModel} | dict.fromkeys(SMALL, AutoModelForImageClassification)
ELSEWHERE = """
import sys
sys.modules["hf_guidance"] = None  # any import of the package raises
import torch, transformers
for folder, auto in zip(sys.argv[1::2], sys.argv[2::2]):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    torch.save(model(torch.load("images.pt"))[0], f"{folder}.pt")
"""


@both
def test_auto_classes_load_a_saved_model_with_the_package(model_class, tmp_path):
    model = build(model_class)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    torch.testing.assert_close(loaded(images())[0], model(images())[0], atol=1e-6, rtol=0)


def test_auto_classes_load_a_saved_model_without_the_package(tmp_path):
    words = []
    models = {
        model_class.__name__: model_class(SMALL[heads]).eval()
        for model_class, heads in {
            FCNModel: FCNForImageClassification,
            PlainResNetModel: PlainResNetForImageClassification,
            **{m: m for m in SMALL},
        }.items()
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        words += [name, AUTO[type(model)].__name__]
    torch.save(images(), tmp_path / "images.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", ELSEWHERE, *words]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for name, model in models.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), model(images())[0], atol=1e-6, rtol=0)


@both
def test_trainer_steps_evaluates_and_divides_the_loss_under_accumulation(model_class, tmp_path):
    rows = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images(batch=16))]
    args = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(build(model_class), args, train_dataset=rows, eval_dataset=rows)
    assert not trainer.model_accepts_loss_kwargs
    trainer.train()
    assert trainer.state.log_history[0]["loss"] < 2  # ln 3, not four times as much
    assert set(trainer.predict(rows).predictions.shape) == {16, 3}


@both
def test_bfloat16_autocast_trains(model_class):
    model = build(model_class).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(images(), labels=torch.tensor([0, 1, 2, 0, 1])).loss
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FCNConfig(hidden_size=0), "hidden_size must be at least 1, got 0"),
        (lambda: FCNConfig(hidden_dropout_prob=1.0), r"a probability in \[0, 1\), got 1.0"),
        (lambda: build(FCNForImageClassification)(images(9)), r"shape \(5, 3, 9, 9\); expected \(batch, 3, 8, 8\)"),
        (lambda: PlainResNetConfig(block_type="wide"), "unknown block_type 'wide'; choose one of basic, bottleneck"),
        (lambda: PlainResNetConfig(depths=[3]), r"hidden_sizes and depths name each stage: got .* and \[3\]"),
        (lambda: PlainResNetConfig(hidden_sizes=[6, 8, 8, 8]), "multiples of 4"),
        (lambda: PlainResNetConfig.of_depth(101), "depth must be one of 18, 34, 50, got 101"),
    ],
)
def test_bad_sizes_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
