"""Logit distillation against scipy; what it leaves alone; what it refuses."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.special import log_softmax
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from hf_guidance.experiments.distillation import DistillationTrainer, check_classes, with_label
from hf_guidance.guide.identity import fingerprint
from hf_guidance.targets import FCNConfig, FCNForImageClassification, RNNConfig, RNNForCausalLM


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


# -------------------------------------------------------------------------------------------------------------- text

WORDS = 11


def language_model(seed=0):
    torch.manual_seed(seed)
    return RNNForCausalLM(RNNConfig(vocab_size=WORDS, hidden_size=6, num_hidden_layers=2))


def causal_guide(vocabulary=WORDS):
    torch.manual_seed(5)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=16, n_embd=8, n_layer=1, n_head=2))


def ragged_rows():
    """Make rows of 9 positions, of which the last 0 to 5 are padding without labels."""
    ids = torch.randint(WORDS, (8, 9), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([9, 4, 7, 5, 9, 6, 8, 4])
    mask = torch.arange(9) < lengths[:, None]
    labels = ids.where(mask, -100)
    names = ("input_ids", "attention_mask", "labels")
    return [dict(zip(names, row, strict=True)) for row in zip(ids, mask.long(), labels, strict=True)]


def distil_text(tmp_path, guide, accumulate=1, rows=None, **options):
    settings = {name: options.pop(name) for name in list(options) if name.startswith("torch_compile")}
    args = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=8 // accumulate, use_cpu=True, report_to=[],
        gradient_accumulation_steps=accumulate, logging_steps=1, disable_tqdm=True, save_strategy="no", max_grad_norm=0,
        learning_rate=0.1, optim="sgd", **settings,
    )  # fmt: skip
    data = ragged_rows() if rows is None else rows
    trainer = DistillationTrainer(model=language_model(), guide=guide, args=args, train_dataset=data, **options)
    trainer.train()
    return trainer


def test_a_language_model_learns_from_every_position_that_predicts_a_label(tmp_path):
    guide = causal_guide().eval()
    batch = {name: torch.stack([row[name] for row in ragged_rows()]) for name in ragged_rows()[0]}
    hard, soft = [], []
    with torch.no_grad():
        ours, theirs = (
            net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double().numpy()
            for net in (language_model().train(), guide)
        )
    for row, labels in enumerate(batch["labels"].numpy()):
        for place in range(8):
            if labels[place + 1] != -100:
                hard.append(-log_softmax(ours[row, place])[labels[place + 1]])
                guided, own = log_softmax(theirs[row, place] / 2), log_softmax(ours[row, place] / 2)
                soft.append((np.exp(guided) * (guided - own)).sum())
    assert len(hard) == 52 - 8  # of 52 valid positions, the first of each row is predicted by none
    logged = distil_text(tmp_path, guide, distillation_weight=0.25, temperature=2.0).state.log_history[0]["loss"]
    assert logged == pytest.approx(0.75 * np.mean(hard) + 0.25 * 4 * np.mean(soft), rel=1e-4)


def test_rows_of_text_weigh_by_their_positions_in_micro_batches_too(tmp_path):
    whole, parts = (distil_text(tmp_path, causal_guide(), accumulate=k) for k in (1, 4))
    losses = [trainer.state.log_history[0]["loss"] for trainer in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_guide_with_another_vocabulary_is_refused(tmp_path):
    words = (
        r"the target gives logits \(8, 9, 11\) and the guide \(8, 9, 13\): .* for text the same vocabulary and tokens"
    )
    with pytest.raises(ValueError, match=words):
        distil_text(tmp_path, causal_guide(13))


def test_a_guide_that_predicts_other_tokens_or_nothing_is_refused_and_so_are_rows_without_labels(tmp_path):
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
    masked = BertForMaskedLM(BertConfig(vocab_size=WORDS, **sizes))
    with pytest.raises(ValueError, match="RNNForCausalLM and the guide BertForMaskedLM one predicts the next token"):
        distil_text(tmp_path, masked)
    with pytest.raises(ValueError, match=r"the guide \(BertModel\) predicts nothing: load it with its task head"):
        distil_text(tmp_path, masked.bert)
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in ragged_rows()]
    with pytest.raises(ValueError, match=r"the batch has no labels, but \['attention_mask', 'input_ids'\]"):
        distil_text(tmp_path, causal_guide(), rows=rows)


def test_columns_of_the_guide_alone_reach_it_and_a_compiled_target_is_known(tmp_path):
    seen, guide = [], causal_guide()
    guide.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    rows = Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in ragged_rows()])
    ours = torch.tensor([row["input_ids"] for row in rows.to_list()])
    rows = rows.add_column("guide_input_ids", (WORDS - 1 - ours).tolist())
    distil_text(tmp_path, guide, rows=rows, torch_compile=True, torch_compile_backend="eager")
    assert sorted(seen[0].tolist()) == sorted((WORDS - 1 - ours).tolist())


def test_smoothed_labels_of_the_rnn_are_shifted(tmp_path):
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.2, use_cpu=True, report_to=[])
    trainer = Trainer(model=language_model(), args=args, train_dataset=ragged_rows())
    (row, *_) = ragged_rows()
    batch = {name: value[None] for name, value in row.items()}
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch)).item()
        logs = log_softmax(language_model()(input_ids=batch["input_ids"]).logits[0, :-1].double().numpy(), 1)
    hard = -logs[np.arange(8), row["labels"][1:].numpy()].mean()
    assert loss == pytest.approx(0.8 * hard + 0.2 * -logs.mean(), rel=1e-5)


def test_masked_models_and_encoder_decoders_predict_the_label_of_the_position_itself():
    sizes = {
        "vocab_size": 7,
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 4,
    }
    bart = BartConfig(
        vocab_size=7, d_model=4, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=4, decoder_ffn_dim=4, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        forced_eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    logits, labels = torch.arange(6.0).view(1, 3, 2), torch.tensor([[-100, 4, 5]])
    for network in (BertForMaskedLM(BertConfig(**sizes)), BartForConditionalGeneration(bart)):
        assert with_label(network, logits, labels).tolist() == [[2, 3], [4, 5]]
    assert with_label(language_model(), logits, labels).tolist() == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match=r"not known which label a position of BertForPreTraining predicts: .* masked"):
        with_label(BertForPreTraining(BertConfig(**sizes)), logits, labels)
    with pytest.raises(ValueError, match=r"a class per row, .*; the labels are \(3,\) of torch.float32 and the logits"):
        with_label(network, logits[0], torch.rand(3))


# -------------------------------------------------------------------------------------------------- what it refuses


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
