"""An inspection proposes the right setting for pairs whose right one is known, and changes nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import LENGTH, VOCABULARY, NormNet, PlainNet, gpt2, llama, seeded, token_batch, token_rows
from torch import Tensor, nn
from trainers import make_trainer, same, trained, weights
from transformers import HfArgumentParser

from hf_guidance import GuidanceConfig
from hf_guidance.experiments import Inspection, inspect
from hf_guidance.experiments.command_line import flags_of_the_file
from hf_guidance.experiments.inspection import facts_of
from hf_guidance.experiments.proposals import DataFacts

ROWS = {"per_device_train_batch_size": 16, "train_dataset": token_rows(64)}


class Dying(nn.Module):
    """A guide whose running statistics are far from its activations, as those of an untrained MobileNet are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = seeded(lambda: nn.Embedding(VOCABULARY, 8), 0)
        self.stage1, self.stage2 = (
            nn.Sequential(nn.BatchNorm1d(LENGTH), nn.ReLU6(), seeded(lambda: nn.Linear(8, 8), i)) for i in (1, 2)
        )
        for stage in (self.stage1, self.stage2):
            stage[0].running_mean += 100.0  # everything is below zero

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.stage2(self.stage1(self.embed(input_ids)))


class Massive(nn.Module):
    """A guide whose first position carries nearly all of the energy."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = seeded(lambda: nn.Embedding(VOCABULARY, 8), 0), nn.Identity()
        self.direction = nn.Parameter(torch.ones(8))

    def forward(self, input_ids: Tensor) -> Tensor:
        first = torch.zeros(input_ids.shape[1])
        first[0] = 1000.0
        return self.out(self.embed(input_ids) + first[:, None] * self.direction * (1 + input_ids[..., None] % 3))


def test_a_measure_that_is_full_gives_way_to_leave_one_out(tmp_path: Path) -> None:
    layers = {"target_layers": ["body.2"], "guide_layers": ["out"]}
    found = inspect(make_trainer(tmp_path, PlainNet(), NormNet(), measure="ridge", **layers, **ROWS), batches=2)
    assert found.measured.width() > found.measured.samples()
    assert found.pairs[0].similarities["ridge"].mean > 0.9
    assert found.pairs[0].room("ridge") < 0.1
    assert any("ridge starts at" in text for text in found.warnings)


def test_rows_of_few_samples_get_leave_one_out(tmp_path: Path) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = seeded(lambda: nn.Linear(4, 200), 0)
            self.out = seeded(lambda: nn.Linear(200, 1), 1)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            found = self.out(self.wide(x).tanh()).squeeze(-1)
            return (found,) if labels is None else (nn.functional.mse_loss(found, labels), found)

    made = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(4, generator=made), "labels": torch.randn((), generator=made)} for _ in range(64)]
    layers = {"target_layers": ["wide"], "guide_layers": ["wide"], "per_device_train_batch_size": 16}
    guide = Rows()
    nn.init.normal_(guide.wide.weight, generator=torch.Generator().manual_seed(5))
    trainer = make_trainer(tmp_path, Rows(), guide, measure="ridge", train_dataset=rows, **layers)
    found = inspect(trainer)
    assert (found.proposal.measure, found.proposal.sample_axis) == ("ridge_loo", "sequence")
    assert "16 samples of at most 200 features" in found.reasons["measure"]


def test_of_many_tokens_in_few_features_in_sample_ridge_is_proposed(tmp_path: Path) -> None:
    found = inspect(make_trainer(tmp_path, gpt2(), llama(), measure="linear_cka", **ROWS))
    assert (found.proposal.sample_axis, found.proposal.measure) == ("token", "ridge")
    assert found.proposed.samples() == 16 * LENGTH
    assert found.proposed.config.sample_axis == "token"
    assert found.measured.config.sample_axis == "sequence"
    assert "96 samples a batch where rows give 16" in found.reasons["sample_axis"]


def test_of_few_tokens_in_many_features_leave_one_out_has_its_smaller_penalty(tmp_path: Path) -> None:
    small = {"per_device_train_batch_size": 4, "train_dataset": token_rows(16, 3)}
    found = inspect(make_trainer(tmp_path, gpt2(), llama(), sample_axis="token", **small))
    assert (found.proposal.measure, found.proposal.ridge_penalty) == ("ridge_loo", 0.1)


def test_a_guide_that_is_dead_in_evaluation_mode_gets_calibrated_statistics(tmp_path: Path) -> None:
    layers = {"target_layers": ["body.1", "body.2"], "guide_layers": ["stage1.2", "stage2.2"]}
    trainer = make_trainer(tmp_path, PlainNet(), Dying(), sample_axis="token", **layers, **ROWS)
    found = inspect(trainer, batches=2)
    assert found.measured.dead() == ["stage1.2", "stage2.2"]
    assert found.proposal.guide_batch_norm == "calibrated"
    assert found.proposed.dead() == []
    assert "2 of 2 guide layers are dead with eval and 0 with calibrated" in found.reasons["guide_batch_norm"]
    assert "dead layers: guide stage1.2, guide stage2.2" in str(found)


def test_dead_layers_that_nothing_revives_are_left_out(tmp_path: Path) -> None:
    guide = llama()
    for weight in guide.layers[2].parameters():
        nn.init.zeros_(weight)

    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.norm, self.zero = guide, nn.BatchNorm1d(12), nn.Identity()

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.zero(0 * self.norm(self.network(input_ids).last_hidden_state.mT).mT)

    layers = {"target_layers": ["transformer.h.*"], "guide_layers": ["network.layers.0", "zero"]}
    found = inspect(make_trainer(tmp_path, gpt2(), Zero(), sample_axis="token", **layers, **ROWS), batches=1)
    assert found.proposal.guide_layers == ["network.layers.0"]
    assert "1 of 2 guide layers are dead, and are left out" in found.reasons["guide_layers"]
    assert "no other mode revives them" in found.reasons["guide_batch_norm"]
    assert next(words for words in found.warnings if "dead" in words).endswith("stays 0. Choose other guide_layers.")
    pairs = {"layer_pairs": ["transformer.h.0~network.layers.0", "transformer.h.1~zero"]}
    found = inspect(make_trainer(tmp_path, gpt2(), Zero(), sample_axis="token", **pairs, **ROWS), batches=1)
    assert found.proposal.layer_pairs == pairs["layer_pairs"][:1]


def test_a_massive_first_token_is_skipped(tmp_path: Path) -> None:
    layers = {"target_layers": ["body.1"], "guide_layers": ["out"], "sample_axis": "token"}
    rows = {"per_device_train_batch_size": 2, "train_dataset": token_rows(64, 64)}
    found = inspect(make_trainer(tmp_path, PlainNet(), Massive(), **layers, **rows))
    assert (found.measured.guides["out"].top_share or 0) > 0.5
    assert found.proposal.skip_first_positions == 1
    assert (found.proposed.guides["out"].top_share or 0) < 0.5
    assert any("skip_first_positions=1" in text for text in found.warnings)


class Sink(nn.Module):
    """A guide whose causal first position is large and the same for rows that begin with the same token."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = llama(), nn.Identity()

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.body(input_ids).last_hidden_state
        return self.out(states * torch.where(torch.arange(states.shape[1]) == 0, 100.0, 1.0)[:, None])


def test_a_first_token_that_all_rows_share_is_skipped(tmp_path: Path) -> None:
    rows = [{**row, "input_ids": torch.cat([torch.zeros(1).long(), row["input_ids"]])[:-1]} for row in token_rows(64)]
    layers = {"target_layers": ["transformer.h.1.mlp.c_fc"], "guide_layers": ["out"], "sample_axis": "token"}
    settings = {**layers, **ROWS, "measure": "ridge_loo", "train_dataset": rows}
    found = inspect(make_trainer(tmp_path, gpt2(), Sink(), **settings))
    assert found.measured.guides["out"].repeated > 0.5
    assert any("samples that occur more than once" in text for text in found.warnings)
    assert found.proposal.skip_first_positions == 1
    assert "Samples with a copy hold up to" in found.reasons["skip_first_positions"]
    assert found.proposed.guides["out"].repeated < 0.5


def test_rows_that_are_copies_are_told(tmp_path: Path) -> None:
    rows = {**ROWS, "train_dataset": 16 * token_rows(4), "measure": "ridge_loo"}
    found = inspect(make_trainer(tmp_path, gpt2(), llama(), **rows), batches=2)
    assert found.measured.guides["hidden_states.1"].repeated > 0.9
    assert any(text.endswith("Leave copies of rows out of the data.") for text in found.warnings)
    assert "not at the start of rows: look for rows that are copies" in found.reasons["skip_first_positions"]


def test_everything_is_bit_identical_afterwards(tmp_path: Path) -> None:
    def make(folder: str) -> Any:
        layers = {"target_layers": ["body.1", "body.4"], "guide_layers": ["out"], "guide_batch_norm": "batch"}
        return make_trainer(tmp_path / folder, PlainNet(dropout=0.2), NormNet(), sample_axis="token", **layers)

    expected = trained(make("plain"))
    trainer = make("inspected")
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [weights(network) for network in (trainer.model, trainer.guide)]
    modes = [[module.training for module in network.modules()] for network in (trainer.model, trainer.guide)]
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    tracks = trainer.guide.norm.track_running_stats
    inspect(trainer, batches=2)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))
    assert all(map(same, before, [weights(network) for network in (trainer.model, trainer.guide)]))
    assert modes == [[module.training for module in network.modules()] for network in (trainer.model, trainer.guide)]
    assert trainer.guide.norm.track_running_stats == tracks
    assert all(bool((parameter.grad == 1).all()) for parameter in trainer.model.parameters())
    trainer.model.zero_grad()
    found = trained(trainer)
    assert same(found[0], expected[0])
    assert [log["loss"] for log in found[1]] == [log["loss"] for log in expected[1]]


def test_the_proposal_is_read_by_the_parser_and_by_recipes_and_trains(tmp_path: Path) -> None:
    found = inspect(make_trainer(tmp_path, gpt2(), llama(), guidance_every=1, max_tokens=512, **ROWS), batches=1)
    settings, report = found.save(tmp_path / "new" / "folder")
    parser: Any = HfArgumentParser(GuidanceConfig)
    assert parser.parse_yaml_file(str(settings)) == (found.proposal,)
    words = [word for flag in flags_of_the_file(str(settings)).values() for word in flag]
    assert parser.parse_args_into_dataclasses(words) == (found.proposal,)
    content = json.loads(report.read_text())
    assert content["measured"]["pairs"][0]["similarities"].keys() >= {"ridge", "ridge_loo", "debiased_cka"}
    assert GuidanceConfig.from_dict(content["proposal"]) == found.proposal
    fields = {name: value for name, value in found.proposal.to_dict().items() if value is not None}
    trained(make_trainer(tmp_path / "run", gpt2(), llama(), **fields, **ROWS))


def test_a_stream_is_read_from_its_beginning_and_one_that_ends_for_good_is_refused(tmp_path: Path) -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            while True:
                yield from token_rows(8)

    found = inspect(make_trainer(tmp_path, gpt2(), llama(), train_dataset=Endless()), batches=3)
    assert isinstance(found, Inspection)
    assert found.measured.batches == 3
    trainer = make_trainer(tmp_path, gpt2(), llama())
    trainer.train_dataset = iter(token_rows(8))
    with pytest.raises(ValueError, match="can be read only once"):
        inspect(trainer)


def test_what_cannot_be_inspected_is_told(tmp_path: Path) -> None:
    for trainer, batches, said in (
        (make_trainer(tmp_path, gpt2()), 1, "the trainer has no guide"),
        (make_trainer(tmp_path, gpt2(), llama()), 0, "batches is 0; it must be a whole number, at least 1"),
        (make_trainer(tmp_path, gpt2(), llama()), "4", "batches is '4'; it must be a whole number"),
        (make_trainer(tmp_path, gpt2().requires_grad_(False), llama()), 1, "no weight of the target is trained"),
        (make_trainer(tmp_path, gpt2(), llama(), train_dataset={"train": token_rows()}), 1, "are a dict with train"),
        (make_trainer(tmp_path, gpt2(), llama(), train_dataset=["text"] * 8), 1, "do not make a batch .*data_collator"),
        (
            make_trainer(tmp_path, gpt2(), llama(), train_dataset=[row for n in (5, 6) for row in token_rows(4, n)]),
            1,
            r"do not make a batch \(RuntimeError: stack expects.*data_collator",
        ),
        (make_trainer(tmp_path, gpt2(), llama(), train_dataset=token_rows(3)), 1, "have 3 rows, fewer than one batch"),
    ):
        with pytest.raises(ValueError, match=said):
            inspect(trainer, batches=batches)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got a GPT2LMHeadModel; expected a GuidanceTrainer"):
        inspect(gpt2())  # type: ignore[arg-type]


@pytest.mark.parametrize("broken", ["target", "guide"])
def test_values_that_are_not_finite_are_told(tmp_path: Path, broken: str) -> None:
    networks = {"target": gpt2(), "guide": llama()}
    next(networks[broken].parameters()).data[:] = torch.nan
    with pytest.raises(ValueError, match=r" is nan on batch 0: look for values that are not finite"):
        inspect(make_trainer(tmp_path, *networks.values(), **ROWS), batches=2)


def test_networks_in_double_precision_are_inspected(tmp_path: Path) -> None:
    found = inspect(make_trainer(tmp_path, gpt2().double(), llama().double(), **ROWS), batches=2)
    assert found.measured.gradient_ratio is not None


def test_facts_about_the_data_are_those_of_the_trainer(tmp_path: Path) -> None:
    rows = [{**row, "id": torch.tensor(i)} for i, row in enumerate(token_rows(24))]
    trainer = make_trainer(tmp_path, gpt2(), llama(), train_dataset=rows, max_steps=60)
    assert facts_of(trainer, token_batch(4)) == DataFacts(4, LENGTH, False, "id", 10.0)
    own = {**token_batch(4), "guide_input_ids": token_batch(4)["input_ids"]}
    assert facts_of(trainer, own).positions == 1
    padded = {**token_batch(4), "attention_mask": torch.ones(4, LENGTH)}
    assert facts_of(trainer, padded).ids is None
    assert facts_of(make_trainer(tmp_path, gpt2(), llama()), token_batch(4)).ids is None
