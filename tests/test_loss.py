"""`GuidanceLoss` in a loop of one's own, against the formula written out over two separate forwards."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import (
    EVEN,
    LENGTH,
    VOCABULARY,
    PlainNet,
    cka,
    gpt2,
    gradients,
    guidance_by_hand,
    hidden_states,
    linear,
    llama,
    llama_config,
    module_outputs,
    seeded,
    t5,
    token_batch,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    DataCollatorWithFlattening,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaModel,
    T5EncoderModel,
)

from hf_guidance import GuidanceConfig, GuidanceLoss
from hf_guidance.loss import Watched
from hf_guidance.schedule import Weights
from hf_guidance.similarity.layers import layer_of
from hf_guidance.similarity.pair_loss import guidance_loss
from hf_guidance.similarity.registry import MEASURES, get_measure
from hf_guidance.targets import RNNConfig, RNNForCausalLM

Batch = dict[str, Tensor]


def watch(target: nn.Module, guide: nn.Module, batch: Batch, where: Any = (), **config: Any) -> tuple[Watched, Any]:
    """One watched forward, and what the target returned."""
    guidance = GuidanceLoss(target, guide, linear(**config))
    with guidance.watch(batch, **dict(where)) as watched:
        outputs = target(**watched.inputs)
    guidance.close()
    return watched, outputs


def inputs_of(network: nn.Module) -> list[Tensor]:
    """The token ids of every forward of a network from now on."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["input_ids"])

    network.register_forward_pre_hook(keep, with_kwargs=True)
    return seen


# -------------------------------------------------------------------------------------------------------- the value


@pytest.mark.parametrize(("reduction", "divisor"), [("sum", 1), ("mean", 3)])
def test_loss_sums_or_averages_one_minus_similarity_over_the_pairs(reduction: str, divisor: int) -> None:
    target, guide, batch = gpt2(), llama(), token_batch()
    watched, _ = watch(target, guide, batch, guidance_reduction=reduction)
    expected = guidance_by_hand(target, guide, batch) / divisor
    torch.testing.assert_close(watched.loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_similarities_are_named_by_pair_and_carry_no_graph() -> None:
    target, guide, batch = gpt2(), llama(), token_batch()
    similarities = watch(target, guide, batch)[0].similarities["linear_cka"]
    ours, theirs = hidden_states(target, batch), hidden_states(guide, {"input_ids": batch["input_ids"]})
    expected = {f"hidden_states.{t + 1}~hidden_states.{g + 1}": cka(ours[t], theirs[g]).item() for t, g in EVEN}
    assert {pair: value.item() for pair, value in similarities.items()} == pytest.approx(expected, abs=1e-5)
    assert not any(value.requires_grad for value in similarities.values())


def test_gradients_are_those_of_the_formula_written_out() -> None:
    target, guide, batch = gpt2(), llama(), token_batch()
    watched, outputs = watch(target, guide, batch)
    expected = gradients(target, target(**batch).loss + 0.5 * guidance_by_hand(target, guide, batch))
    got = gradients(target, outputs.loss + 0.5 * watched.loss)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_every_pair_counts_when_the_guide_is_deeper_than_the_target() -> None:
    target, guide, batch = gpt2(), llama(layers=5), token_batch()
    watched, _ = watch(target, guide, batch)
    ours, theirs = hidden_states(target, batch), hidden_states(guide, {"input_ids": batch["input_ids"]})
    pairs = [(0, 0), (0, 1), (1, 2), (1, 3), (1, 4)]  # ⌊i/4 + ½⌋
    expected = sum(1 - cka(ours[t], theirs[g]).item() for t, g in pairs)
    assert len(watched.similarities["linear_cka"]) == 5
    assert watched.loss.item() == pytest.approx(expected, abs=1e-5)


def test_explicit_pairs_compare_modules_and_hidden_states_as_named() -> None:
    target, guide, batch = gpt2(), llama(), token_batch()
    pairs = ["transformer.h.0.mlp~layers.2", "transformer.wte~hidden_states.1", "transformer.h.0.mlp~hidden_states.0"]
    watched, _ = watch(target, guide, batch, layer_pairs=pairs)
    ids = {"input_ids": batch["input_ids"]}
    mlp, wte = module_outputs(target, ["transformer.h.0.mlp", "transformer.wte"], **ids)
    embedded, first, last = module_outputs(guide, ["embed_tokens", "layers.0", "layers.2"], **ids)
    expected = [cka(mlp, last).item(), cka(wte, first).item(), cka(mlp, embedded).item()]
    assert [value.item() for value in watched.similarities["linear_cka"].values()] == pytest.approx(expected, abs=1e-5)
    assert list(watched.similarities["linear_cka"]) == pairs


@pytest.mark.parametrize(("reduction", "divisor"), [("sum", 1.0), ("mean", 2.25)])
def test_pairs_count_with_their_weights_and_are_named_without(reduction: str, divisor: float) -> None:
    target, guide, batch = gpt2().double(), llama().double(), token_batch()
    pairs = [
        "hidden_states.1~hidden_states.2@0.25",
        "hidden_states.1~hidden_states.3",
        "hidden_states.2~hidden_states.3@1",
    ]
    watched, _ = watch(
        target,
        guide,
        batch,
        layer_pairs=pairs,
        guidance_reduction=reduction,
        measure="linear_cka",
        log_measures=["rsa"],
    )
    ours, theirs = hidden_states(target, batch), hidden_states(guide, {"input_ids": batch["input_ids"]})
    first, second, third = cka(ours[0], theirs[1]), cka(ours[0], theirs[2]), cka(ours[1], theirs[2])
    expected = (0.25 * (1 - first) + (1 - second) + (1 - third)) / divisor
    assert watched.loss.item() == pytest.approx(expected.item(), abs=1e-9)
    names = [pair.partition("@")[0] for pair in pairs]
    values = [watched.similarities["linear_cka"][name].item() for name in names]
    assert values == pytest.approx([first.item(), second.item(), third.item()], abs=1e-9)
    assert list(watched.similarities["rsa"]) == names
    torch.testing.assert_close(gradients(target, watched.loss), gradients(target, expected), rtol=1e-7, atol=1e-10)


def test_padding_is_left_out() -> None:
    mask = torch.arange(LENGTH) < torch.tensor([6, 2, 4, 3, 5, 6, 1, 4])[:, None]
    target, guide, batch = gpt2(), llama(), {**token_batch(), "attention_mask": mask.long()}
    watched, _ = watch(target, guide, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ours, theirs = hidden_states(target, inputs), hidden_states(guide, inputs)
    expected = sum(1 - cka(ours[t], theirs[g], mask).item() for t, g in EVEN)
    assert watched.loss.item() == pytest.approx(expected, abs=1e-5)
    other = {**batch, "input_ids": torch.where(mask, batch["input_ids"], 3)}
    assert watch(target, guide, other)[0].loss.item() == pytest.approx(watched.loss.item(), abs=1e-6)


def test_on_the_token_axis_every_valid_position_is_a_sample() -> None:
    mask = torch.arange(LENGTH) < torch.tensor([6, 2, 4, 3, 5, 6, 1, 4])[:, None]
    target, guide, batch = gpt2(), llama(), {**token_batch(), "attention_mask": mask.long()}
    watched, _ = watch(target, guide, batch, sample_axis="token")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ours, theirs = hidden_states(target, inputs), hidden_states(guide, inputs)
    expected = sum(1 - cka(ours[t][mask], theirs[g][mask]).item() for t, g in EVEN)
    assert watched.loss.item() == pytest.approx(expected, abs=1e-5)


def test_the_loss_is_taken_from_the_one_forward_with_its_own_dropout_mask() -> None:
    target, guide, batch = gpt2(dropout=0.5).train(), llama(), token_batch()
    runs = inputs_of(target)
    watched, outputs = watch(target, guide, batch)
    theirs = hidden_states(guide, {"input_ids": batch["input_ids"]})
    expected = sum(1 - cka(outputs.hidden_states[t + 1], theirs[g]).item() for t, g in EVEN)
    assert watched.loss.item() == pytest.approx(expected, abs=1e-5)
    assert len(runs) == 1


def test_under_autocast_only_the_forwards_are_bfloat16() -> None:
    target, guide, batch = gpt2(), llama(), token_batch()
    with torch.autocast("cpu", torch.bfloat16):
        watched, outputs = watch(target, guide, batch)
    assert outputs.logits.dtype == torch.bfloat16
    assert watched.loss.dtype == torch.float32
    assert watched.loss.item() == pytest.approx(guidance_by_hand(target, guide, batch).item(), abs=2e-2)


def test_without_gradients_there_is_a_value_all_the_same() -> None:
    target, guide, batch = gpt2(), llama(), token_batch()
    with torch.no_grad():
        watched, _ = watch(target, guide, batch)
        assert watched.loss.item() == pytest.approx(guidance_by_hand(target, guide, batch).item(), abs=1e-5)


# --------------------------------------------------------------------------------------------------- other measures


def song(features_target: Tensor, features_guide: Tensor) -> float:
    """Debiased CKA by Song's three terms, in float64."""

    def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        n, ones = len(k), torch.ones(len(k), dtype=k.dtype)
        cross = 2 / (n - 2) * (ones @ k @ l @ ones)
        return (k * l).sum() + (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2)) - cross

    def hollow(features: Tensor) -> Tensor:
        x = features.flatten(1).double()
        return (x @ x.T).fill_diagonal_(0)

    k, l = hollow(features_target.detach()), hollow(features_guide.detach())  # noqa: E741
    return (hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()).item()


def test_log_measures_are_reported_beside_the_one_trained_on_and_do_not_change_it() -> None:
    target, guide, batch = gpt2(), llama(), token_batch()
    watched, _ = watch(target, guide, batch, log_measures=["debiased_cka", "linear_cka"])
    alone, _ = watch(target, guide, batch, log_measures=[])
    ours, theirs = hidden_states(target, batch), hidden_states(guide, {"input_ids": batch["input_ids"]})
    expected = [song(ours[t], theirs[g]) for t, g in EVEN]
    assert list(watched.similarities) == ["linear_cka", "debiased_cka"]
    assert [v.item() for v in watched.similarities["debiased_cka"].values()] == pytest.approx(expected, abs=1e-5)
    assert list(alone.similarities) == ["linear_cka"]
    for one, other in zip(gradients(target, watched.loss), gradients(target, alone.loss), strict=True):
        assert torch.equal(one, other)


def test_a_logged_measure_that_needs_more_samples_is_left_out() -> None:
    watched, _ = watch(gpt2(), llama(), token_batch(rows=3), log_measures=["debiased_cka"])
    assert list(watched.similarities) == ["linear_cka"]
    assert watched.loss is not None


# ---------------------------------------------------------------------------------------------- too few, and chance


@pytest.mark.parametrize(("measure", "rows"), [("linear_cka", 2), ("debiased_cka", 3)])
def test_a_batch_with_too_few_rows_has_no_loss_and_does_not_run_the_guide(measure: str, rows: int) -> None:
    guide = llama()
    runs = inputs_of(guide)
    watched, outputs = watch(gpt2(), guide, token_batch(rows), measure=measure)
    assert (watched.loss, watched.similarities, runs) == (None, {}, [])
    assert outputs.hidden_states is None


def test_a_batch_with_too_few_valid_tokens_has_no_loss() -> None:
    mask = torch.zeros(8, LENGTH, dtype=torch.long)
    mask[:2, 0] = 1
    watched, _ = watch(gpt2(), llama(), {**token_batch(), "attention_mask": mask}, sample_axis="token")
    assert (watched.loss, watched.similarities) == (None, {})


RANDOM = {
    "noise": {"guide_input": "noise"},
    "prealign_noise": {"guide_input": "prealign_noise", "prealign_steps": 10},
    "shuffled": {"guide_input": "shuffled"},
    "choice of tokens": {"sample_axis": "token", "max_tokens": 10},
}


@pytest.mark.parametrize("config", RANDOM.values(), ids=RANDOM.keys())
def test_chance_depends_on_seed_step_micro_step_and_rank_and_on_nothing_else(config: dict[str, Any]) -> None:
    target, guide, batch = gpt2(), llama(), token_batch(rows=16)

    def loss(seed: int = 0, **where: int) -> float:
        guidance = GuidanceLoss(target, guide, linear(**config), seed=seed)
        with guidance.watch(batch, **where) as watched:
            target(**watched.inputs)
        guidance.close()
        return watched.loss.item()

    before = torch.get_rng_state()
    first = loss(seed=1, step=2, micro_step=3, rank=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert loss(seed=1, step=2, micro_step=3, rank=4) == first
    others = [loss(seed=9, step=2, micro_step=3, rank=4), loss(seed=1, step=9, micro_step=3, rank=4)]
    others += [loss(seed=1, step=2, micro_step=9, rank=4), loss(seed=1, step=2, micro_step=3, rank=9)]
    assert len({first, *others}) == 5


def test_noise_is_for_the_guide_alone() -> None:
    target, guide, batch = gpt2(), llama(), token_batch()
    ours, theirs = inputs_of(target), inputs_of(guide)
    watched, _ = watch(target, guide, batch, guide_input="noise")
    assert torch.equal(ours[0], batch["input_ids"])
    assert not torch.equal(theirs[0], batch["input_ids"])
    noise = {"input_ids": theirs[0]}
    expected = sum(1 - cka(hidden_states(target, batch)[t], hidden_states(guide, noise)[g]).item() for t, g in EVEN)
    assert watched.loss.item() == pytest.approx(expected, abs=1e-5)


def test_prealign_noise_is_for_both_while_prealigning_and_for_none_after() -> None:
    target, guide, batch = gpt2(), llama(), token_batch()
    ours, theirs = inputs_of(target), inputs_of(guide)
    for step in (0, 1):
        watch(target, guide, batch, {"step": step}, guide_input="prealign_noise", prealign_steps=1)
    assert torch.equal(ours[0], theirs[0])
    assert not torch.equal(ours[0], batch["input_ids"])
    assert torch.equal(ours[1], batch["input_ids"])
    assert torch.equal(theirs[1], batch["input_ids"])


def test_prealign_noise_holds_no_token_that_one_of_the_two_does_not_know() -> None:
    target, guide = gpt2(vocabulary=40), llama(vocabulary=5)
    ours, batch = inputs_of(target), {"input_ids": torch.full((8, 30), 4)}
    config = {"guide_input": "prealign_noise", "prealign_steps": 1, "guide_shares_tokenizer": True}
    watch(target, guide, batch, **config)
    assert set(ours[0].unique().tolist()) == set(range(5))


def test_shuffled_gives_the_guide_every_row_at_another_place() -> None:
    guide, batch = llama(), token_batch()
    theirs = inputs_of(guide)
    watch(gpt2(), guide, batch, guide_input="shuffled")
    same = (theirs[0][:, None] == batch["input_ids"][None]).all(-1)
    assert same.sum(0).tolist() == same.sum(1).tolist() == [1] * 8
    assert not same.diagonal().any()


def test_shuffled_takes_rows_of_the_whole_batch_for_those_that_are_compared() -> None:
    guide, batch = llama(), token_batch()
    theirs = inputs_of(guide)
    watch(gpt2(), guide, batch, guide_input="shuffled", guide_rows=3)
    same = (theirs[0][:, None] == batch["input_ids"][None]).all(-1)
    assert same.sum(1).tolist() == [1] * 3  # each is a row of the batch
    chosen: list[Tensor] = inputs_of(other := llama())
    watch(gpt2(), other, batch, guide_rows=3)
    assert not (theirs[0] == chosen[0]).all(1).any()


def test_rows_of_unique_lengths_are_an_error_in_the_first_batch_and_stay_in_later_ones() -> None:
    even, batch = token_batch(), token_batch()
    length = batch["input_ids"].shape[1]
    batch["attention_mask"] = (torch.arange(length) < torch.arange(length, length - 8, -1).clamp(min=3)[:, None]).long()
    assert len(batch["attention_mask"].sum(1).unique()) > 3
    config = linear(guide_input="shuffled", sample_axis="token")
    loss = GuidanceLoss(gpt2(), llama(), config)
    with (
        pytest.raises(ValueError, match="exchanges rows of equal length if positions are compared"),
        loss.watch(batch, step=0),
    ):
        pass
    loss = GuidanceLoss(gpt2(), llama(), config)
    for step, rows in enumerate((even, batch)):
        with loss.watch(rows, step=step) as watched:
            loss.target(**watched.inputs)
        assert watched.loss is not None


# ------------------------------------------------------------------------------------------------------ whom it suits


def bert() -> BertModel:
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    return BertModel(BertConfig(vocab_size=VOCABULARY, **sizes))


def bart() -> BartModel:
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 0}
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 3, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "forced_eos_token_id": 0}
    return BartModel(BartConfig(vocab_size=VOCABULARY, **ids, **sizes, **heads))


def mamba() -> MambaModel:
    return MambaModel(MambaConfig(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=3, state_size=4))


GUIDES: dict[str, Callable[[], nn.Module]] = {
    "decoder": llama,
    "encoder": bert,
    "encoder of an encoder-decoder": lambda: T5EncoderModel(t5(layers=3).config),
    "encoder-decoder": bart,
    "state space": mamba,
    "recurrent": lambda: RNNForCausalLM(RNNConfig(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=3)).model,
}


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES.keys())
def test_any_text_model_guides_by_its_hidden_states(make: Callable[[], nn.Module]) -> None:
    target, guide, batch = gpt2(), seeded(make, 3), token_batch()
    watched, _ = watch(target, guide, batch)
    assert watched.loss.item() == pytest.approx(guidance_by_hand(target, guide, batch).item(), abs=1e-5)


def test_an_encoder_decoder_guide_takes_decoder_inputs_of_its_own() -> None:
    target, guide, batch = gpt2(), t5(layers=3), token_batch()
    own = {"input_ids": batch["input_ids"].flip(1), "decoder_input_ids": batch["input_ids"][:, :4]}
    watched, _ = watch(target, guide, {**batch, **{f"guide_{name}": value for name, value in own.items()}})
    ours, theirs = hidden_states(target, batch), hidden_states(guide, own)
    expected = sum(1 - cka(ours[t], theirs[g]).item() for t, g in EVEN)
    assert watched.loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("last", [nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 8)], ids=lambda m: type(m).__name__)
def test_a_plain_module_guides_by_its_named_layers(last: nn.Module) -> None:
    target, guide, batch = gpt2(), nn.Sequential(nn.Embedding(VOCABULARY, 8), last), token_batch()
    watched, _ = watch(target, guide, batch, guide_layers=["0", type(last).__name__])
    ours, theirs = hidden_states(target, batch), module_outputs(guide, ["0", "1"], batch["input_ids"])
    expected = sum(1 - cka(x, y).item() for x, y in zip(ours, theirs, strict=True))
    assert watched.loss.item() == pytest.approx(expected, abs=1e-5)


def test_a_plain_module_that_returns_a_tuple_is_guided_by_its_named_layers() -> None:
    target, guide, batch = PlainNet(), llama(), token_batch()
    watched, (task_loss, _) = watch(target, guide, batch, target_layers=["Linear"])
    ours = module_outputs(target, ["body.1", "body.4"], batch["input_ids"])
    with torch.no_grad():
        theirs = hidden_states(guide, {"input_ids": batch["input_ids"]})
    expected = sum(1 - cka(ours[t], theirs[g]) for t, g in EVEN)
    got = gradients(target, task_loss + watched.loss)
    torch.testing.assert_close(got, gradients(target, target(**batch)[0] + expected), rtol=1e-4, atol=1e-6)


def test_an_rnn_is_guided_by_its_hidden_states() -> None:
    target = seeded(lambda: RNNForCausalLM(RNNConfig(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2)), 5)
    guide, batch = llama(), token_batch()
    watched, _ = watch(target, guide, batch)
    expected = gradients(target, guidance_by_hand(target, guide, batch))
    torch.testing.assert_close(gradients(target, watched.loss), expected, rtol=1e-4, atol=1e-6)


def test_the_guide_of_an_encoder_decoder_gets_decoder_inputs_made_from_the_labels() -> None:
    target, guide, batch = t5(0), t5(1), token_batch()
    watched, _ = watch(target, guide, batch)
    shifted = torch.cat([torch.zeros(8, 1, dtype=torch.long), batch["labels"][:, :-1]], 1)
    inputs = {"input_ids": batch["input_ids"], "decoder_input_ids": shifted}
    ours, theirs = hidden_states(target, inputs), hidden_states(guide, inputs)
    assert watched.loss.item() == pytest.approx(sum(1 - cka(ours[i], theirs[i]).item() for i in (0, 1)), abs=1e-5)


CHECKPOINTED = [["hidden_states"], ["transformer.h.*"], ["transformer.h.*.mlp"]]


@pytest.mark.parametrize("layers", CHECKPOINTED, ids=["hidden states", "blocks", "inside blocks"])
def test_activation_checkpointing_changes_no_gradient(layers: list[str]) -> None:
    def run(checkpointing: bool) -> tuple[float, list[Tensor]]:
        target = gpt2(dropout=0.1).train()
        if checkpointing:
            target.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        watched, outputs = seeded(lambda: watch(target, llama(), token_batch(), target_layers=layers), 0)
        return watched.loss.item(), gradients(target, outputs.loss + watched.loss)

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ what is wrong


def test_words_when_the_target_did_not_run_inside_watch() -> None:
    target, batch = gpt2(), token_batch()
    guidance = GuidanceLoss(target, llama())
    with pytest.raises(ValueError, match="target did not run inside `watch`"), guidance.watch(batch):
        gpt2(seed=9)(**batch)


def test_words_when_the_target_ran_twice_inside_watch() -> None:
    target, batch = gpt2(), token_batch()
    guidance = GuidanceLoss(target, llama())
    with pytest.raises(ValueError, match="ran more than once in one forward"), guidance.watch(batch):
        [target(**batch) for _ in range(2)]


def test_words_when_guide_and_target_are_not_two_networks() -> None:
    target = gpt2()
    with pytest.raises(ValueError, match=r"shares 28 parameters with the target.*copy"):
        GuidanceLoss(target, target)
    with pytest.raises(ValueError, match=r"shares 25 parameters with the target.*copy"):
        GuidanceLoss(target, nn.Sequential(target.transformer.h, target.transformer.wte, nn.Linear(2, 2)))


def test_words_when_vocabularies_differ() -> None:
    with pytest.raises(ValueError, match=r"target's vocabulary has 17 tokens and the guide's 23.*guide_input_ids"):
        watch(gpt2(), llama(vocabulary=23), token_batch())


def test_other_vocabularies_are_fine_with_columns_of_the_guides_own() -> None:
    target, guide, batch = gpt2(), llama(vocabulary=23), token_batch()
    own, seen = batch["input_ids"] + 6, inputs_of(target)
    watched, _ = watch(target, guide, {**batch, "guide_input_ids": own})
    theirs = hidden_states(guide, {"input_ids": own})
    expected = sum(1 - cka(hidden_states(target, batch)[t], theirs[g]).item() for t, g in EVEN)
    assert watched.loss.item() == pytest.approx(expected, abs=1e-5)
    assert set(watched.inputs) == {"input_ids", "labels"}
    assert torch.equal(seen[0], batch["input_ids"])


def test_other_vocabularies_are_fine_where_one_tokenizer_serves_both() -> None:
    target, guide, batch = gpt2(), llama(vocabulary=23), token_batch()
    watched, _ = watch(target, guide, batch, guide_shares_tokenizer=True)
    assert watched.loss.item() == pytest.approx(guidance_by_hand(target, guide, batch).item(), abs=1e-5)


def test_words_when_the_guides_rows_are_not_the_targets() -> None:
    batch = {**token_batch(), "guide_input_ids": torch.zeros(7, LENGTH, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"target's columns have 8 rows and the guide's .* 7: both"):
        watch(gpt2(), llama(), batch)


def test_words_when_the_guides_tokens_are_not_the_targets() -> None:
    mask = torch.ones(8, LENGTH, dtype=torch.long)
    batch = {**token_batch(), "attention_mask": mask}
    own = {"guide_input_ids": torch.zeros(8, 4, dtype=torch.long), "guide_attention_mask": mask[:, :4]}
    with pytest.raises(ValueError, match=r"guide has 32 valid tokens and the target 48.*sample_axis='sequence'"):
        watch(gpt2(), llama(), {**batch, **own}, sample_axis="token")


def test_words_when_the_targets_layers_are_frozen() -> None:
    target = gpt2()
    target.transformer.requires_grad_(False)
    with pytest.raises(ValueError, match=r"none of the target layers .*hidden_states\.1.* carries a gradient"):
        watch(target, llama(), token_batch())


# ---------------------------------------------------------------------------------------------- what it leaves behind


def test_the_guide_is_frozen_and_keeps_every_bit() -> None:
    target, guide = gpt2(), llama().train()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    watched, outputs = watch(target, guide, token_batch())
    (outputs.loss + watched.loss).backward()
    assert not guide.training
    assert all(not p.requires_grad and p.grad is None for p in guide.parameters())
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())


def test_a_guide_layers_activations_are_freed_before_the_guide_has_finished() -> None:
    guide = nn.Sequential(nn.Embedding(VOCABULARY, 8), *(nn.Linear(8, 8) for _ in range(4)))
    alive: list[list[bool]] = []
    outputs: list[Any] = []

    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        alive.append([reference() is not None for reference in outputs])
        outputs.append(weakref.ref(output))

    guidance = GuidanceLoss(target := gpt2(), guide, GuidanceConfig(guide_layers=["Linear"]))
    for module in guide:
        module.register_forward_hook(look)
    with guidance.watch(token_batch()) as watched:
        assert [reference() for reference in outputs] == [None] * 5
        target(**watched.inputs)
    assert alive == [[], [True], [False, True], [False, False, True], [False, False, False, True]]


def test_a_guide_is_run_no_further_than_its_last_layer_in_a_pair() -> None:
    guide = nn.Sequential(nn.Embedding(VOCABULARY, 8), *(nn.Linear(8, 8) for _ in range(4)))
    ran: list[int] = []
    for number, module in enumerate(guide):
        module.register_forward_pre_hook(lambda module, args, number=number: ran.append(number))
    guidance = GuidanceLoss(target := gpt2(), guide, GuidanceConfig(guide_layers=["1", "2"]))
    found = []
    for _ in range(2):  # which layers are needed is known once a batch has been seen
        with guidance.watch(token_batch()) as watched:
            target(**watched.inputs)
        found.append(watched.loss.item())
    assert ran == [0, 1, 2, 3, 4, 0, 1, 2]
    assert found[0] == found[1]


def test_at_steps_between_no_guide_is_run() -> None:
    guidance = GuidanceLoss(target := gpt2(), guide := llama(), GuidanceConfig(guidance_every=2))
    runs = inputs_of(guide)
    losses = []
    for step in range(4):
        with guidance.watch(token_batch(), step=step) as watched:
            target(**watched.inputs)
        losses.append(watched.loss)
    assert [loss is not None for loss in losses] == [True, False, True, False]
    assert len(runs) == 2


def test_what_is_only_looked_at_is_left_out_where_it_is_not_logged() -> None:
    guidance = GuidanceLoss(target := gpt2(), llama(), linear())
    with guidance.watch(token_batch(), log=False) as watched:
        target(**watched.inputs)
    assert list(watched.similarities) == ["linear_cka"]


def test_features_that_are_overwritten_in_place_have_the_gradient_of_what_they_were() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.first = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.first(self.embed(input_ids)).relu_()

    target, guide, batch = seeded(InPlace, 3), llama(), token_batch()
    guidance = GuidanceLoss(target, guide, linear(target_layers=["first"], guide_layers=["hidden_states.1"]))
    with guidance.watch(batch) as watched:
        target(batch["input_ids"])
    ours = target.first(target.embed(batch["input_ids"]))
    expected = 1 - cka(ours, hidden_states(guide, {"input_ids": batch["input_ids"]})[0])
    for got, wanted in zip(gradients(target, watched.loss), gradients(target, expected), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_between_forward_and_backward_one_matrix_a_target_layer_is_kept() -> None:
    rows = 64
    pairs = [("t0", "g0"), ("t1", "g1"), ("t1", "g2"), ("t2", "g3")]
    for width in (8, 80):  # as features, and as Gram matrices
        layers = {f"t{i}": layer_of(torch.randn(rows, width, requires_grad=True)) for i in range(3)}
        guides = {f"g{i}": layer_of(torch.randn(rows, 5)) for i in range(4)}
        for measure in MEASURES.values():
            leaves = {name: replace(layer, values=layer.values.clone()) for name, layer in layers.items()}
            loss, _ = guidance_loss(pairs, measure, leaves, guides)
            graph = sum(tensor.numel() for tensor in _saved(loss))
            assert graph <= 3 * rows * min(width, rows) + 100, measure.name


def _saved(loss: Tensor) -> list[Tensor]:
    """All tensors that the graph above the layers' values keeps."""
    found, open_nodes, seen = [], [loss.grad_fn], set()
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen or "CloneBackward" in node.name():
            continue
        seen.add(node)
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            if isinstance(value, Tensor):
                found.append(value)
        open_nodes += [following for following, _ in node.next_functions]
    return found


def test_hidden_states_of_the_guide_are_freed_before_the_target_runs() -> None:
    guide, states = llama(), []
    guidance = GuidanceLoss(target := gpt2(), guide)
    guide.register_forward_hook(lambda module, args, output: states.extend(map(weakref.ref, output.hidden_states)))
    with guidance.watch(token_batch()) as watched:
        assert len(states) == 4
        assert not any(reference() is not None for reference in states)
        target(**watched.inputs)


def test_outside_watch_the_networks_are_as_ever_even_after_an_error_inside() -> None:
    target, guide, batch = gpt2(), llama(), token_batch()
    guidance = GuidanceLoss(target, guide)
    with pytest.raises(RuntimeError, match="mine"), guidance.watch(batch):
        raise RuntimeError("mine")
    assert target(**batch).hidden_states is None
    assert guide(input_ids=batch["input_ids"]).hidden_states is None
    with guidance.watch(batch) as watched:
        target(**watched.inputs)
    assert watched.loss is not None


def test_a_guided_target_can_be_copied() -> None:
    target, guide, batch = gpt2(), llama(), token_batch()
    guidance = GuidanceLoss(target, guide)
    with guidance.watch(batch) as watched:
        target(**watched.inputs)
    copied = copy.deepcopy(target)
    with guidance.watch(batch) as watched:
        target(**watched.inputs)
        assert copied(**batch).hidden_states is None


def test_close_takes_every_hook_off() -> None:
    target, guide = gpt2(), llama()
    modules = [*target.modules(), *guide.modules()]
    for network in (target, guide):  # transformers has hooks of its own once hidden states were asked for
        hidden_states(network, {"input_ids": token_batch()["input_ids"]})

    def hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)

    before = hooks()
    pairs = ["transformer.h.0~layers.0", "hidden_states.2~hidden_states.3"]
    guidance = GuidanceLoss(target, guide, GuidanceConfig(layer_pairs=pairs))
    assert hooks() == before + 8
    guidance.close()
    assert hooks() == before
    assert guidance_of(guidance, token_batch()) is not None
    assert hooks() == before + 8, "the next watch puts them back"


# ------------------------------------------------------------------------------------------- the loss to train on


@pytest.mark.parametrize(
    ("config", "step", "weights"),
    [
        ({"guidance_weight": 0.25}, 7, (0.25, 1.0)),
        ({"guidance_weight": 0.0}, 0, (0.0, 1.0)),
        ({"guidance_weight": 2.0, "guidance_stop_step": 3}, 3, (0.0, 1.0)),
        ({"guidance_weight": 2.0, "prealign_steps": 3}, 2, (2.0, 0.0)),
        ({"guidance_weight": 2.0, "guidance_schedule": "linear"}, 5, (1.0, 1.0)),
        ({"guidance_weight": 2.0, "guidance_warmup_steps": 4}, 0, (0.5, 1.0)),
    ],
)
def test_a_loop_of_ones_own_follows_weight_and_schedule(config: dict[str, Any], step: int, weights: Any) -> None:
    target, guide, batch = gpt2(), llama(), token_batch()
    runs = inputs_of(guide)
    guidance = GuidanceLoss(target, guide, linear(**config), total_steps=10)
    with guidance.watch(batch, step=step) as watched:
        target(**watched.inputs)
    task = torch.tensor(3.0)
    expected = weights[1] * 3 + weights[0] * guidance_by_hand(target, guide, batch).item()
    assert watched.total(task).item() == pytest.approx(expected, abs=1e-5)
    assert len(runs) == (weights[0] > 0) + 1  # by hand it ran once more


def test_a_warm_up_that_is_longer_than_the_run_is_refused_before_it_begins() -> None:
    config = GuidanceConfig(guidance_warmup_steps=11)
    with pytest.raises(ValueError, match="guidance_warmup_steps is 11, but the run has 10 optimizer steps"):
        GuidanceLoss(gpt2(), llama(), config, total_steps=10)
    assert GuidanceLoss(gpt2(), llama(), config).weights(0) == pytest.approx((1 / 11, 1.0))  # of unknown length


def test_a_loop_of_ones_own_stops_guidance_for_good() -> None:
    guide, target, batch = llama(), gpt2(), token_batch()
    guidance, runs = GuidanceLoss(target, guide, GuidanceConfig(prealign_steps=9)), inputs_of(guide)
    guidance.stopped_at = 5
    for step, weights in ((4, (1.0, 0.0)), (5, (0.0, 1.0)), (99, (0.0, 1.0))):
        with guidance.watch(batch, step=step) as watched:
            target(**watched.inputs)
        assert watched.weights == weights
        assert (watched.loss is None) == (weights[0] == 0)
    assert len(runs) == 1


def test_weights_can_be_given_to_measure_whatever_the_step_says() -> None:
    guidance = GuidanceLoss(gpt2(), llama(), GuidanceConfig(guidance_stop_step=1))
    with guidance.watch(token_batch(), step=5, weights=Weights(1.0, 1.0)) as watched:
        guidance.target(**watched.inputs)
    assert watched.loss is not None
    assert watched.weights == (1.0, 1.0)


def test_a_batch_too_small_to_compare_leaves_the_task_loss() -> None:
    with GuidanceLoss(gpt2(), llama()).watch(token_batch(rows=2)) as watched:
        pass
    task = torch.tensor(3.0)
    assert watched.total(task) is task


def test_an_encoder_decoder_guide_without_decoder_inputs_says_what_it_needs() -> None:
    guidance = GuidanceLoss(gpt2(), t5())
    words = "It is an encoder-decoder, and the batch has nothing for its decoder: add guide_decoder_input_ids"
    with pytest.raises(ValueError, match=words), guidance.watch(token_batch()):
        pass


# ------------------------------------------------------------------------------------------------- some of the rows


@pytest.mark.parametrize("axis", ["sequence", "token"])
def test_a_guide_on_some_rows_gives_the_loss_and_the_gradient_of_a_batch_of_these(axis: str) -> None:
    target, guide, batch = gpt2(), llama(), token_batch(16)
    seen = inputs_of(guide)
    settings = {"sample_axis": axis, "measure": "debiased_cka"}
    some, _ = watch(target, guide, batch, {"step": 3}, guide_rows=5, **settings)
    (rows,) = seen
    assert rows.shape == (5, LENGTH)
    (some.loss + 0 * sum(p.sum() for p in target.parameters())).backward()
    found = {name: parameter.grad.clone() for name, parameter in target.named_parameters()}
    target.zero_grad()
    alone, _ = watch(target, guide, {"input_ids": rows}, {"step": 3}, **settings)
    (alone.loss + 0 * sum(p.sum() for p in target.parameters())).backward()
    torch.testing.assert_close(some.loss, alone.loss)
    for name, parameter in target.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_each_step_the_guide_sees_other_rows() -> None:
    target, guide, batch = gpt2(), llama(), token_batch(16)
    guidance = GuidanceLoss(target, guide, GuidanceConfig(guide_rows=5))
    seen = inputs_of(guide)
    for step in (0, 0, 1):
        with guidance.watch(batch, step=step) as watched:
            target(**watched.inputs)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_rows_are_chosen_among_columns_that_have_one_entry_for_each_row_alone() -> None:
    batch = token_batch(16) | {"cu_seqlens": torch.arange(3)}
    with pytest.raises(ValueError, match=r"one entry for each row, but their lengths are .*'cu_seqlens': 3"):
        watch(gpt2(), llama(), batch, guide_rows=5)


# ----------------------------------------------------------------------------------------------------- within each row


def within_by_hand(target: nn.Module, guide: nn.Module, batch: Batch, measure: str, lengths: list[int]) -> Tensor:
    """Σ over `EVEN` of 1 − the mean over the rows of the similarity of a row's own positions."""
    with torch.no_grad():
        theirs = hidden_states(guide, {k: batch[k] for k in ("input_ids", "attention_mask")})
    ours, similar = hidden_states(target, {k: batch[k] for k in ("input_ids", "attention_mask")}), get_measure(measure)
    total = torch.tensor(0.0)
    for t, g in EVEN:
        rows = [similar(ours[t][i, :n], theirs[g][i, :n]) for i, n in enumerate(lengths) if n >= similar.min_samples]
        total = total + 1 - torch.stack(rows).mean()
    return total


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("lengths", [[6] * 8, [6, 4, 2, 5, 6, 1, 4, 6]], ids=["full rows", "ragged"])
def test_within_each_row_its_positions_are_compared(measure: str, lengths: list[int]) -> None:
    target, guide, batch = gpt2(), llama(), token_batch()
    batch["attention_mask"] = (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()
    watched, _ = watch(target, guide, batch, sample_axis="within", measure=measure, max_tokens=LENGTH)
    expected = within_by_hand(target, guide, batch, measure, lengths)
    torch.testing.assert_close(watched.loss, expected, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(gradients(target, watched.loss), gradients(target, expected), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def documents(lengths: list[int]) -> list[dict[str, list[int]]]:
    ids = torch.randint(VOCABULARY, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(4))
    return [{"input_ids": row[:n].tolist(), "labels": row[:n].tolist()} for row, n in zip(ids, lengths, strict=True)]


@pytest.mark.parametrize("axis", ["sequence", "token", "within"])
@pytest.mark.parametrize("settings", [{}, {"max_tokens": 5}, {"skip_first_positions": 1}], ids=str)
def test_packed_and_padded_documents_give_the_same_loss(axis: str, settings: dict[str, Any]) -> None:
    rows = documents([6, 5, 3, 6, 4, 9, 5, 8])
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    padded = {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask}
    packed = DataCollatorWithFlattening()(rows)
    target, guide = seeded(lambda: LlamaForCausalLM(llama_config(layers=2)), 0), llama()
    target.config.use_cache = False  # as Trainer does; else transformers takes the documents for one
    found = []
    for batch in (padded, packed):
        watched, _ = watch(target, guide, dict(batch), sample_axis=axis, measure="debiased_cka", **settings)
        found.append((watched.loss.item(), gradients(target, watched.loss)))
    (loss, slopes), (packed_loss, packed_slopes) = found
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    for got, wanted in zip(packed_slopes, slopes, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ragged", [False, True])
def test_within_rows_no_tensor_grows_with_the_square_of_the_batch(ragged: bool) -> None:
    target, guide = gpt2(), llama()

    def largest(rows: int) -> int:
        sizes = [0]

        class Watching(TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                found = function(*args, **(kwargs or {}))
                sizes.extend(t.numel() for t in pytree.tree_leaves(found) if isinstance(t, Tensor))
                return found

        batch = token_batch(rows)
        lengths = torch.arange(rows) % 3 + 4 if ragged else torch.full((rows,), LENGTH)
        batch["attention_mask"] = (torch.arange(LENGTH) < lengths[:, None]).long()
        guidance = GuidanceLoss(target, guide, GuidanceConfig(sample_axis="within"))
        with guidance.watch(batch) as watched:
            target(**watched.inputs)
        with Watching():
            gradients(target, watched.loss)
        with Watching(), guidance.watch(batch) as watched:
            target(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        guidance.close()
        return max(sizes)

    assert largest(128) <= 2 * largest(64)


def test_rows_with_too_few_positions_are_left_out_and_a_batch_of_such_rows_is_not_guided() -> None:
    target, guide, batch = gpt2(), llama(), token_batch(3)
    batch["attention_mask"] = (torch.arange(LENGTH) < torch.tensor([6, 3, 5])[:, None]).long()
    watched, _ = watch(target, guide, batch, sample_axis="within", measure="debiased_cka")
    assert watched.rows == 2
    two = {name: value[[0, 2]] for name, value in batch.items()}
    alone, _ = watch(target, guide, two, sample_axis="within", measure="debiased_cka")
    torch.testing.assert_close(watched.loss, alone.loss)
    short = batch | {"attention_mask": (torch.arange(LENGTH) < torch.tensor([3, 2, 1])[:, None]).long()}
    unguided, _ = watch(target, guide, short, sample_axis="within", measure="debiased_cka")
    assert unguided.loss is None
    assert "debiased_cka needs at least 4 valid positions in a row" in unguided.why_unguided


def test_within_rows_both_layers_need_the_same_positions_and_the_error_names_both_numbers() -> None:
    target, guide, batch = gpt2(), llama(), token_batch()
    batch["guide_input_ids"] = batch["input_ids"][:, :5]
    with pytest.raises(ValueError, match=r"gives 6 samples \(6 positions a row\) and the guide layer 5 \(5\)"):
        watch(target, guide, batch, sample_axis="within", guide_shares_tokenizer=True)
    with pytest.raises(ValueError, match=r"layer 'classifier' gave shape \(8, 3\), which has no positions"):
        watch(Pooling(), guide, token_batch(), sample_axis="within", target_layers=["classifier"])


class Pooling(nn.Module):
    """A classifier of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.classifier = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.classifier(self.embed(input_ids).mean(1))


def test_within_rows_a_network_is_like_its_own_copy_on_whatever_positions_are_chosen() -> None:
    batch = token_batch()
    watched, _ = watch(gpt2(), gpt2(), batch, sample_axis="within", max_tokens=4, measure="linear_cka")
    assert watched.loss.item() == pytest.approx(0, abs=1e-5)


# ------------------------------------------------------------------------------------- one process, rows, and threads


def guidance_of(loss: GuidanceLoss, batch: dict[str, Tensor]) -> Tensor:
    """The guidance loss of a batch, with its graph."""
    with loss.watch(batch) as watched:
        loss.target(**watched.inputs)
    assert watched.loss is not None
    return watched.loss


@pytest.mark.parametrize("axis", ["sequence", "token"])
def test_the_global_batch_of_one_process_is_the_local_one(axis: str) -> None:
    found = []
    for similarity_batch in ("local", "global"):
        target = gpt2()
        config = GuidanceConfig(sample_axis=axis, max_tokens=16, similarity_batch=similarity_batch)
        loss = guidance_of(GuidanceLoss(target, llama(), config), token_batch())
        found.append([loss, *gradients(target, loss)])
    assert all(map(torch.equal, *found))


class Embedder(nn.Module):
    """A network of one id per row, as a recommender has it."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.body = seeded(lambda: nn.Sequential(nn.Embedding(40, width), nn.Linear(width, width), nn.Tanh()), seed)

    def forward(self, user: Tensor) -> Tensor:
        return self.body(user)


def test_rows_of_one_number_are_guided() -> None:
    target, guide, batch = Embedder(8, 0), Embedder(6, 1), {"user": torch.arange(12), "labels": torch.rand(12)}
    config = GuidanceConfig(measure="linear_cka", target_layers=["body.1"], guide_layers=["body.2"])
    loss = GuidanceLoss(target, guide, config)
    with loss.watch(batch) as watched:
        target(watched.inputs["user"])
    with torch.no_grad():
        ours, theirs = target.body[:2](batch["user"]), guide(batch["user"])
    assert watched.loss is not None
    assert watched.loss.item() == pytest.approx(1 - cka(ours, theirs).item(), abs=1e-5)
    some = GuidanceLoss(target, guide, replace(config, guide_rows=5))
    with some.watch(batch) as watched:
        target(watched.inputs["user"])
    assert watched.loss is not None


def test_threads_share_a_guide_and_each_has_the_loss_that_it_has_alone() -> None:
    guide = llama()
    pairs = ["transformer.h.0~layers.0", "hidden_states.2~hidden_states.2"]
    losses = [GuidanceLoss(gpt2(seed), guide, linear(layer_pairs=pairs)) for seed in range(3)]
    batches = [token_batch(seed=seed) for seed in range(20)]
    alone = [[guidance_of(loss, batch).item() for batch in batches] for loss in losses]

    with ThreadPoolExecutor(len(losses)) as pool:
        together = pool.map(lambda loss: [guidance_of(loss, batch).item() for batch in batches], losses)
    assert list(together) == alone


def test_a_loss_that_is_in_use_says_so() -> None:
    loss = GuidanceLoss(gpt2(), llama(), linear())
    words = (
        r"layers of the target are being read already, here or in another thread: give each thread a GuidanceLoss of"
    )
    with loss.watch(token_batch()) as watched:
        with pytest.raises(RuntimeError, match=words), loss.watch(token_batch()):
            pass
        loss.target(**watched.inputs)
    assert watched.loss is not None


@pytest.mark.parametrize("axis", ["sequence", "token", "within"])
def test_a_batch_whose_rows_are_too_short_is_left_out_and_said(axis: str) -> None:
    loss = GuidanceLoss(gpt2(), llama(), linear(sample_axis=axis, skip_first_positions=4))
    for length, guided in ((8, True), (6 if axis == "within" else 4, False), (8, True)):
        with loss.watch(token_batch(length=length)) as watched:
            loss.target(**watched.inputs)
        assert (watched.loss is not None) is guided
        assert ("of which skip_first_positions=4 leaves" in watched.why_unguided) is not guided


@pytest.mark.parametrize("axis", ["sequence", "token", "within"])
def test_first_positions_that_leave_none_are_an_error_on_the_first_batch(axis: str) -> None:
    words = r"^the rows have 6 positions, of which skip_first_positions=6 leaves 0, and \d are needed: lower it"
    with pytest.raises(ValueError, match=words):
        watch(gpt2(), llama(), token_batch(length=6), sample_axis=axis, skip_first_positions=6)


def test_rows_that_are_too_short_by_themselves_are_told_without_a_setting_that_nobody_set() -> None:
    watched, _ = watch(gpt2(), llama(), token_batch(length=2), sample_axis="within")
    assert watched.why_unguided == (
        "the rows have 2 positions, and the measure needs 3 in each: set sample_axis='token', or leave out such rows"
    )


def test_first_positions_of_layers_that_have_none_are_an_error() -> None:
    target = nn.Sequential(nn.Flatten(), nn.Linear(48, 8))
    guide = nn.Sequential(nn.Flatten(), nn.Linear(48, 6))
    loss = GuidanceLoss(target, guide, linear(target_layers=["1"], guide_layers=["1"], skip_first_positions=2))
    words = r"skip_first_positions is 2, but no layer that is compared has positions \(batch, length, d\) to leave out"
    with pytest.raises(ValueError, match=words), loss.watch({"pixel_values": torch.rand(5, 3, 4, 4)}) as watched:
        target(watched.inputs["pixel_values"])


def test_a_pair_named_twice_by_two_names_of_a_layer_is_an_error() -> None:
    words = r"layer_pairs names the pair transformer\.h\.0~layers\.0 twice, by two names of a layer: leave one out"
    with pytest.raises(ValueError, match=words):
        GuidanceLoss(gpt2(), llama(), linear(layer_pairs=["transformer.h.0~layers.0@0.5", "h.0~layers.0@0.9"]))


def test_a_logged_measure_that_needs_more_samples_is_said_on_the_first_batch(caplog: pytest.LogCaptureFixture) -> None:
    loss = GuidanceLoss(gpt2(), llama(), linear())
    for _ in range(2):
        with loss.watch(token_batch(rows=3)) as watched:
            loss.target(**watched.inputs)
        assert list(watched.similarities) == ["linear_cka"]
    assert caplog.messages == ["debiased_cka is not logged: it needs 4 samples, and 3 are compared."]


@pytest.mark.parametrize("axis", ["sequence", "token", "within"])
def test_padding_behind_packed_documents_changes_nothing(axis: str) -> None:
    target, guide = gpt2(), llama()
    lengths = (5, 3, 6, 4)
    ids = token_batch(1, length=sum(lengths))["input_ids"]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    losses = []
    for more in (0, 3):
        batch = {
            "input_ids": nn.functional.pad(ids, (0, more)),
            "position_ids": nn.functional.pad(position_ids, (0, more)),
        }
        losses.append(watch(target, guide, batch, sample_axis=axis, measure="linear_cka")[0].loss)
    torch.testing.assert_close(losses[1], losses[0])


SIDES = {
    "encoder": ["encoder_hidden_states"],
    "decoder": ["hidden_states"],
    "both": ["encoder_hidden_states", "hidden_states"],
}


@pytest.mark.parametrize("side", SIDES)
def test_within_rows_of_an_encoder_decoder_the_compared_side_tells_which_rows_are_long_enough(side: str) -> None:
    target, guide = t5(0), t5(1)
    ids = token_batch(6)["input_ids"]
    batch = {
        "input_ids": ids,
        "attention_mask": (torch.arange(LENGTH) < torch.tensor([6, 5, 2, 6, 4, 6])[:, None]).long(),
    }
    labels = token_batch(6, seed=5)["input_ids"]
    batch["labels"] = torch.where(torch.arange(LENGTH) < torch.tensor([6, 4, 6, 2, 5, 4])[:, None], labels, -100)
    layers = SIDES[side]
    settings: dict[str, Any] = {"target_layers": layers, "guide_layers": layers, "layer_mapping": "even"}
    watched, _ = watch(target, guide, batch, sample_axis="within", measure="debiased_cka", **settings)
    lengths = {"encoder": batch["attention_mask"].sum(1), "decoder": (batch["labels"] != -100).sum(1)}
    long_enough = [n >= 4 for kind, n in lengths.items() if side in (kind, "both")]
    rows = torch.stack(long_enough).all(0).nonzero().flatten().tolist()
    assert watched.rows == len(rows)
    inputs = {**batch, "decoder_input_ids": target.prepare_decoder_input_ids_from_labels(labels=batch["labels"])}
    with torch.no_grad():
        outputs = [network(**inputs, output_hidden_states=True) for network in (target, guide)]
    for pair, value in watched.similarities["debiased_cka"].items():
        kind, index = pair.split("~")[0].rsplit(".", 1)
        states = "encoder_hidden_states" if kind.startswith("encoder") else "decoder_hidden_states"
        n = lengths["encoder" if kind.startswith("encoder") else "decoder"]
        x, y = (getattr(output, states)[int(index)] for output in outputs)
        expected = torch.stack([get_measure("debiased_cka")(x[i, : n[i]], y[i, : n[i]]) for i in rows]).mean()
        assert value.item() == pytest.approx(expected.item(), abs=1e-4)


def test_within_rows_a_logged_measure_leaves_out_the_rows_that_are_too_short_for_it_alone() -> None:
    batch = token_batch(4)
    batch["attention_mask"] = (torch.arange(LENGTH) < torch.tensor([6, 3, 6, 5])[:, None]).long()
    target, guide = gpt2(), llama()
    settings: dict[str, Any] = {"sample_axis": "within", "measure": "linear_cka", "log_measures": ["debiased_cka"]}
    watched, _ = watch(target, guide, batch, **settings)
    assert watched.rows == 4
    long = {name: value[[0, 2, 3]] for name, value in batch.items()}
    alone, _ = watch(target, guide, long, sample_axis="within", measure="debiased_cka")
    logged = watched.similarities["debiased_cka"]
    assert {n: v.item() for n, v in logged.items()} == pytest.approx(
        {n: v.item() for n, v in alone.similarities["debiased_cka"].items()}, abs=1e-5
    )


def test_a_class_a_mask_that_is_a_list_and_other_rows_for_the_guide_are_named() -> None:
    with pytest.raises(ValueError, match="target is the class GPT2LMHeadModel"):
        GuidanceLoss(GPT2LMHeadModel, llama())  # type: ignore[arg-type]
    batch, target = token_batch(8), gpt2()
    for axis in ("sequence", "token", "within"):
        loss = GuidanceLoss(target, llama(), linear(sample_axis=axis))
        wrong = {**batch, "attention_mask": torch.ones_like(batch["input_ids"]).tolist()}
        words = r"attention_mask is a list, .*; expected a tensor \(batch, length\)"
        with pytest.raises(ValueError, match=words), loss.watch(wrong):
            pass
        wrong = {**batch, "guide_input_ids": batch["input_ids"][:5]}
        with pytest.raises(ValueError, match="the target's columns have 8 rows and the guide's"), loss.watch(wrong):
            pass


class Queries(nn.Module):
    """A decoder of queries, as of DETR: as many as the text is long, which the text's mask does not describe."""

    def __init__(self, is_encoder_decoder: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder)
        self.embed, self.layers = nn.Embedding(VOCABULARY, 8), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, output_hidden_states: bool = False) -> dict[str, Any]:
        text = (self.embed(input_ids) * attention_mask[..., None]).sum(1, keepdim=True)
        states = [text + torch.arange(float(LENGTH))[:, None]]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return {"decoder_hidden_states": tuple(states), "loss": states[-1].mean()}


def test_queries_of_a_decoder_do_not_get_the_mask_of_a_text_that_is_as_long() -> None:
    batch = token_batch(8)
    lengths = torch.tensor([6, 5, 4, 6, 3, 6, 2, 6])[:, None]
    batch = {"input_ids": batch["input_ids"], "attention_mask": (torch.arange(LENGTH) < lengths).long()}
    target, guide = seeded(Queries, 0), seeded(Queries, 1)
    loss = GuidanceLoss(target, guide, linear())
    with loss.watch(batch) as watched:
        target(**watched.inputs)
    assert watched.loss is not None
    states = [network(**batch)["decoder_hidden_states"][1:] for network in (target, guide)]
    expected = sum(1 - cka(*(state.flatten(1) for state in pair)) for pair in zip(*states, strict=True))
    assert watched.loss.item() == pytest.approx(float(expected.detach()), abs=1e-5)
