"""Logit distillation against scipy; what it leaves alone; what it refuses."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from transformers import Trainer, TrainingArguments

from hf_guidance.experiments.distillation import DistillationTrainer, check_classes
from hf_guidance.guide.identity import fingerprint
from hf_guidance.targets import FCNConfig, FCNForImageClassification


def network(seed, classes=3):
    torch.manual_seed(seed)
    return FCNForImageClassification(FCNConfig(image_size=4, hidden_size=6, num_hidden_layers=2, num_labels=classes))


def trainer_of(tmp_path, guide, kind=DistillationTrainer, accumulate=1, **options):
    images = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    rows = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]
    args = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=8 // accumulate, use_cpu=True, report_to=[],
        gradient_accumulation_steps=accumulate, logging_steps=1, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    if kind is DistillationTrainer:
        options["guide"] = guide
    return kind(model=network(0), args=args, train_dataset=rows, eval_dataset=rows, **options)


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.3, 2.0), (1.0, 4.0)])
def test_the_loss_is_hinton_et_als_and_the_guide_stays_as_it_is(weight, temperature, tmp_path):
    guide = network(7)
    before = fingerprint(guide)
    trainer = trainer_of(tmp_path, guide, distillation_weight=weight, temperature=temperature)
    batch = next(iter(trainer.get_train_dataloader()))
    target = network(0).train()
    with torch.no_grad():
        ours = target(pixel_values=batch["pixel_values"]).logits.double().numpy()
        theirs = guide(pixel_values=batch["pixel_values"]).logits.double().numpy()
    hard = -log_softmax(ours, 1)[np.arange(8), batch["labels"].numpy()].mean()
    logs = log_softmax(theirs / temperature, 1), log_softmax(ours / temperature, 1)
    soft = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean()
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]
    assert logged == pytest.approx((1 - weight) * hard + weight * temperature**2 * soft, rel=1e-3)
    assert fingerprint(guide) == before
    assert not guide.training


def test_the_loss_is_not_larger_under_accumulation(tmp_path):
    whole, parts = (trainer_of(tmp_path, network(7), accumulate=k) for k in (1, 2))
    for trainer in (whole, parts):
        trainer.train()
    losses = [trainer.state.log_history[0]["loss"] for trainer in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=0.3)  # batch norm sees halves


def test_evaluation_is_the_tasks_alone(tmp_path):
    distilled, plain = (trainer_of(tmp_path, network(7), kind) for kind in (DistillationTrainer, Trainer))
    assert distilled.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distillation_weight": 1.5}, r"distillation_weight is 1\.5 .*the weight must be in \[0, 1\]"),
        ({"temperature": 0.0}, r"temperature 0\.0; .* the temperature above 0"),
    ],
)
def test_a_weight_or_temperature_that_is_not_possible_is_named(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        trainer_of(tmp_path, network(7), **options)


def test_a_guide_with_other_classes_is_refused(tmp_path):
    words = r"the target gives logits \(8, 3\) and the guide \(8, 5\): distillation needs a guide with the same classes"
    with pytest.raises(ValueError, match=words):
        trainer_of(tmp_path, network(7, classes=5)).train()


def test_classes_of_a_saved_guide_are_compared_with_the_datas(tmp_path):
    names = {0: "cat", 1: "dog"}
    FCNConfig(id2label=names, label2id={name: i for i, name in names.items()}).save_pretrained(tmp_path)
    check_classes(str(tmp_path), ["cat", "dog"])
    check_classes(str(tmp_path), ["0", "1"])  # other names may mean the same
    with pytest.raises(ValueError, match=r"has 2 and the data has 3\. Choose a guide that was trained on these data"):
        check_classes(str(tmp_path), ["cat", "dog", "cow"])
    with pytest.raises(ValueError, match=r"in the same order: those of .* are cat, dog …, those of the data dog, cat"):
        check_classes(str(tmp_path), ["dog", "cat"])
