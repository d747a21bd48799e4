"""Trainers of sentence-transformers behind the mixin: one forward for each column of texts, each guided.

pip install sentence-transformers && pytest -m trainers
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import cka, linear, seeded
from launching import two_processes
from torch import Tensor, nn
from trainers import same, train_logs, weights
from transformers import BertConfig, BertModel, BertTokenizerFast

from hf_guidance import GuidanceConfig, GuidanceMixin, load_guide, load_guide_of
from hf_guidance.guide.identity import fingerprint

pytestmark = pytest.mark.trainers
st = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(20))]
COLUMNS = ("anchor", "positive", "negative")
EVEN = [(1, 1), (2, 2), (2, 3)]  # of two layers and three; index 0 is the embeddings
SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


class Guided(GuidanceMixin, st.SentenceTransformerTrainer):
    """As the README shows for any Trainer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved networks: `target` and `guide`, and `dropping`, a target with dropout."""
    place = tmp_path_factory.mktemp("networks")
    (place / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizerFast(str(place / "vocab.txt"))
    kinds = {"target": (0, 2, 0.0), "guide": (1, 3, 0.0), "dropping": (0, 2, 0.1), "large": (1, 2, 0.0)}
    for name, (seed, layers, dropout) in kinds.items():
        config = BertConfig(
            vocab_size=len(WORDS) + 3 * (name == "large"),
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        seeded(lambda config=config: BertModel(config), seed).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    return place


def network(path: Path) -> Any:
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    return st.SentenceTransformer(modules=[Transformer(str(path)), Pooling(16)], device="cpu")


def texts(rows: int = 24, **more: list[Any]) -> Any:
    draw = random.Random(0)
    columns = {c: [" ".join(draw.choices(WORDS[5:], k=draw.randrange(3, 9))) for _ in range(rows)] for c in COLUMNS}
    return datasets.Dataset.from_dict({**columns, **more})


def triplets(model: Any) -> nn.Module:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    return MultipleNegativesRankingLoss(model)


def arguments(folder: Path, **changes: Any) -> Any:
    defaults = {"max_steps": 3, "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no", "seed": 7}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "learning_rate": 1e-2}
    return st.SentenceTransformerTrainingArguments(str(folder), **{**defaults, **changes})


def make(
    out: Path,
    target: Any,
    guide: Any = None,
    loss: Callable[[Any], nn.Module] = triplets,
    data: Any = None,
    guidance: GuidanceConfig | None = None,
    kind: Any = Guided,
    **changes: Any,
) -> Any:
    own: dict[str, Any] = {"guide": guide, "guidance": guidance or linear()} if guide is not None else {}
    data = texts() if data is None else data
    return kind(
        model=target, args=arguments(out, **changes), train_dataset=data, eval_dataset=data, loss=loss(target), **own
    )


def forwards_of(target: Any) -> list[dict[str, Tensor]]:
    """The token ids and masks of every forward in training from now on. Padding is the token 0."""
    seen: list[dict[str, Tensor]] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            seen.append(masked(kwargs["input_ids"]))

    target[0].auto_model.embeddings.register_forward_pre_hook(keep, with_kwargs=True)
    return seen


def masked(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def by_hand(target: nn.Module, guide: nn.Module, forwards: list[dict[str, Tensor]]) -> Tensor:
    """Mean over forwards of Σ (1 − CKA), from forwards of the transformers alone."""
    losses = []
    for inputs in forwards:
        ours = target(**inputs, output_hidden_states=True).hidden_states
        with torch.no_grad():
            theirs = guide(**inputs, output_hidden_states=True).hidden_states
        mask = inputs["attention_mask"]
        losses.append(sum(1 - cka(ours[t], theirs[g], mask) for t, g in EVEN))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("joined", "rows"), [(False, [8, 8, 8]), (True, [8, 16])])
def test_each_forward_is_compared_with_the_guides_and_the_losses_are_averaged(
    joined: bool, rows: list[int], folder: Path, tmp_path: Path
) -> None:
    from sentence_transformers.base.losses.merged_forward import column_merging_disabled

    target, guide, fresh = network(folder / "target"), network(folder / "guide"), network(folder / "target")
    forwards = forwards_of(target)
    trainer = make(tmp_path, target, load_guide(guide), max_steps=1, **SGD)
    with nullcontext() if joined else column_merging_disabled():
        trainer.train()
    assert [len(inputs["input_ids"]) for inputs in forwards] == rows
    (log,) = train_logs(trainer)
    expected = by_hand(fresh[0].auto_model, guide[0].auto_model, forwards)
    assert log["guidance/loss"] == pytest.approx(expected.item(), abs=1e-5)
    columns = [masked(ids) for inputs in forwards for ids in inputs["input_ids"].split(8)]
    task = triplets(fresh)(columns, None)
    assert log["task/loss"] == pytest.approx(task.item(), abs=1e-5)
    assert log["loss"] == pytest.approx(log["task/loss"] + log["guidance/loss"], rel=1e-5)
    (task + expected.float()).backward()
    for (name, was), (_, now) in zip(fresh.named_parameters(), target.named_parameters(), strict=True):
        moved = was if was.grad is None else was - 0.1 * was.grad
        torch.testing.assert_close(now, moved, rtol=1e-4, atol=1e-5, msg=name)


def test_weight_0_is_the_plain_trainer_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    runs = []
    for kind, guide in ((st.SentenceTransformerTrainer, None), (Guided, None), (Guided, load_guide(folder / "guide"))):
        trainer = make(tmp_path, network(folder / "dropping"), guide, guidance=linear(guidance_weight=0.0), kind=kind)
        trainer.train()
        runs.append((weights(trainer.model), [log["loss"] for log in train_logs(trainer)]))
    for found, losses in runs[1:]:
        assert same(found, runs[0][0])
        assert losses == runs[0][1]


def test_the_guides_weights_stay_and_the_targets_forward_is_its_own_again(folder: Path, tmp_path: Path) -> None:
    target, guide = network(folder / "dropping"), load_guide(folder / "guide")
    before = weights(guide)
    trainer = make(tmp_path, target, guide, gradient_accumulation_steps=2, bf16=True)
    trainer.train()
    assert same(before, weights(guide))
    assert "forward" not in vars(target[0].auto_model)
    for log in train_logs(trainer):
        assert log["loss"] == pytest.approx(log["task/loss"] + log["guidance/loss"], rel=1e-2)
        assert log["guidance/weight"] == 1


def test_a_guide_is_a_model_its_transformer_or_its_folder(folder: Path, tmp_path: Path) -> None:
    model = network(folder / "guide")
    model.save_pretrained(str(tmp_path / "saved"))
    guides = [
        load_guide(model),
        load_guide(tmp_path / "saved"),
        make(tmp_path, network(folder / "target"), model).guide,
    ]
    assert {type(guide) for guide in guides} == {BertModel}
    assert len({fingerprint(guide) for guide in guides}) == 1
    assert not any(weight.requires_grad for guide in guides for weight in guide.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"target_layers": ["encoder.layer.*"], "guide_layers": ["encoder.layer.*.output"]},
        {"sample_axis": "token", "max_tokens": 16},
        {"guide_input": "noise"},
        {"guide_rows": 6},
        {"prealign_steps": 1, "guide_input": "prealign_noise"},
        {"layer_pairs": ["hidden_states.2~hidden_states.3"], "measure": "debiased_cka"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_settings_train(settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    trainer = make(tmp_path, network(folder / "dropping"), load_guide(folder / "guide"), guidance=linear(**settings))
    trainer.train()
    assert [log["guidance/loss"] > 0 for log in train_logs(trainer)] == [True] * 3


def test_pairs_with_a_label_train_and_similarities_are_measured_on_validation_data(
    folder: Path, tmp_path: Path
) -> None:
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    rows = texts(label=[i / 24 for i in range(24)]).remove_columns("negative")
    config, guide = linear(eval_similarity=True), load_guide(folder / "guide")
    trainer = make(tmp_path, network(folder / "target"), guide, CosineSimilarityLoss, rows, config)
    trainer.train()
    plain = make(tmp_path, trainer.model, None, CosineSimilarityLoss, rows, kind=st.SentenceTransformerTrainer)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == plain.evaluate()["eval_loss"]
    loader, expected = trainer.get_eval_dataloader(), []
    for batch in loader:
        columns = [masked(features["input_ids"]) for features in trainer.collect_features(batch)[0]]
        expected.append(1 - by_hand(trainer.model[0].auto_model, guide, columns).item() / 3)
    assert metrics["eval_guidance/similarity"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_a_resumed_run_ends_with_the_same_weights_and_the_guide_is_rebuilt(folder: Path, tmp_path: Path) -> None:
    def trainer() -> Any:
        saving = {"save_strategy": "steps", "save_steps": 1}
        guide = load_guide(folder / "guide", untrained=True, seed=3)
        return make(tmp_path, network(folder / "dropping"), guide, **saving)

    whole = trainer()
    whole.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(whole.model), weights(again.model))
    assert (tmp_path / "checkpoint-3" / "modules.json").is_file()
    assert fingerprint(load_guide_of(tmp_path / "checkpoint-3")) == fingerprint(again.guide)


def test_the_base_of_a_model_with_an_adapter_is_its_guide(folder: Path, tmp_path: Path) -> None:
    import peft

    target = network(folder / "dropping")
    lora = peft.LoraConfig(target_modules=["query"], r=2, init_lora_weights=False)
    peft.inject_adapter_in_model(lora, target[0].auto_model)
    trainer = make(tmp_path, target, "base")
    before = weights(target)
    trainer.train()
    after = weights(target)
    assert {name for name in after if not torch.equal(before[name], after[name])} == {n for n in after if "lora_" in n}
    assert trainer.guide_identity["fingerprint"] == fingerprint(load_guide(folder / "target"))
    assert train_logs(trainer)[0]["guidance/loss"] > 1e-4


def test_a_cross_encoder_is_guided_in_its_one_forward(folder: Path, tmp_path: Path) -> None:
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments

    class GuidedCross(GuidanceMixin, CrossEncoderTrainer):
        pass

    rows = texts(label=[float(i % 2) for i in range(24)]).remove_columns("negative")
    settings = {"max_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no"}
    args = CrossEncoderTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, report_to="none", **settings)
    target = CrossEncoder(str(folder / "target"), num_labels=1, device="cpu")
    guide = load_guide(folder / "guide")
    trainer = GuidedCross(model=target, args=args, train_dataset=rows, guide=guide, guidance=linear())
    trainer.train()
    assert [0 < log["guidance/loss"] < 3 for log in train_logs(trainer)] == [True, True]


def cached(model: Any) -> nn.Module:
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    return CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)


def test_a_loss_that_runs_the_target_in_its_backward_pass_is_an_error(folder: Path, tmp_path: Path) -> None:
    trainer = make(tmp_path, network(folder / "target"), load_guide(folder / "guide"), cached)
    with pytest.raises(ValueError, match=r"did not run with gradients while the loss was computed.*\(Cached…Loss\)"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sample_axis": "within"}, "^sample_axis='within' needs a trainer that runs the target once"),
        ({"sketch": 8, "cache_guide": "cache", "sample_id_column": "id"}, "^cache_guide needs a trainer that"),
        ({"similarity_batch": "accumulated"}, "^similarity_batch='accumulated' needs a trainer that"),
    ],
)
def test_settings_for_one_forward_are_refused(
    settings: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        make(
            tmp_path,
            network(folder / "target"),
            load_guide(folder / "guide"),
            guidance=linear(**settings),
            gradient_accumulation_steps=2,
        )


@pytest.mark.parametrize(
    ("settings", "guidance", "words"),
    [
        ({"per_device_train_batch_size": 2}, {}, "per_device_train_batch_size is 2, .* but linear_cka needs at least"),
        ({}, {"guide_rows": 9}, "guide_rows is 9, but a batch has 8 rows"),
    ],
    ids=["few rows", "guide_rows"],
)
def test_too_few_rows_are_refused_in_our_words(
    settings: dict[str, Any], guidance: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    guide = load_guide(network(folder / "guide"))
    with pytest.raises(ValueError, match=words):
        make(tmp_path, network(folder / "target"), guide, guidance=linear(**guidance), **settings)


def test_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"vocabulary has 25 tokens and the guide's 28, but sentence-transformers token"
    ):
        make(tmp_path, network(folder / "target"), load_guide(folder / "large"))
    shared = linear(guide_shares_tokenizer=True)
    make(tmp_path, network(folder / "target"), load_guide(folder / "large"), guidance=shared).train()


def test_a_model_without_a_transformer_is_refused(folder: Path, tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = network(folder / "target")[0].tokenizer
    static = st.SentenceTransformer(
        modules=[StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=8)], device="cpu"
    )
    with pytest.raises(ValueError, match=r"the target \(SentenceTransformer\) holds 0 transformers \(none\)"):
        make(tmp_path, static, load_guide(folder / "guide"))


def test_two_processes_end_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "scripts" / "two_columns.py"
    first, second = (torch.load(file) for file in two_processes(script, tmp_path, folder))
    assert same(first["weights"], second["weights"])
    assert first["guidance"] == second["guidance"]
    assert first["wrapper"] == "DistributedDataParallel"
