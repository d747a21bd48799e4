"""LayerDrop in the target: a layer keeps its name whichever layers a step skips, and skipped ones are left out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import arguments, cka, gpt2, linear, llama, seeded, token_batch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from trainers import same, train_logs, weights
from transformers import (
    BartConfig,
    BartModel,
    BioGptConfig,
    BioGptModel,
    FlaubertConfig,
    FlaubertModel,
    FSMTConfig,
    FSMTModel,
    M2M100Config,
    M2M100Model,
    MvpConfig,
    MvpModel,
    TimeSeriesTransformerConfig,
    TimeSeriesTransformerModel,
    Trainer,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
)
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Encoder

from hf_guidance import GuidanceLoss, GuidanceTrainer
from hf_guidance.analysis.similarity_map import similarity_map
from hf_guidance.features.layer_drop import LayerDrop
from hf_guidance.features.reader import LayerReader
from hf_guidance.loss import Watched
from hf_guidance.trainer.accumulation import Accumulated

Batch = dict[str, Tensor]
LAYERS = 3
SKIPPED = [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
TOKENS = {"input_ids": token_batch()["input_ids"] + 3}  # none is padding
BOTH = TOKENS | {"decoder_input_ids": token_batch(seed=1)["input_ids"] + 3}


def audio(rows: int = 8, seed: int = 0) -> Batch:
    return {"input_values": torch.randn(rows, 200, generator=torch.Generator().manual_seed(seed))}


def series() -> Batch:
    random = torch.Generator().manual_seed(0)
    past, future = torch.randn(8, 10, 1, generator=random), torch.randn(8, 4, 1, generator=random)
    seen = {"past_values": past[..., 0], "past_time_features": past, "past_observed_mask": torch.ones(8, 10)}
    return seen | {"future_values": future[..., 0], "future_time_features": future}


def wav2vec2_config(**changes: Any) -> Wav2Vec2Config:
    sizes = {"hidden_size": 8, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 8}
    convolutions = {"conv_dim": (4, 4), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    others = {"mask_time_prob": 0.0, "classifier_proj_size": 8, "layerdrop": 0.5}
    return Wav2Vec2Config(**{**sizes, **convolutions, **positions, **others, **changes})


def wav2vec2(seed: int = 0, make: Callable[[Any], nn.Module] = Wav2Vec2Model, **changes: Any) -> Any:
    return seeded(lambda: make(wav2vec2_config(**changes)).train(), seed)


def two_stacks(kind: Any, config: Any, **changes: Any) -> Callable[[], Any]:
    """An encoder-decoder whose decoder skips layers."""
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    sizes = {"d_model": 8, "encoder_layers": LAYERS, "decoder_layers": LAYERS, **heads}
    drop = {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.5}
    return lambda: seeded(lambda: kind(config(**{**sizes, **drop, **(changes or {"vocab_size": 20})})).train(), 0)


def biogpt() -> Any:
    sizes = {"hidden_size": 8, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 8}
    return seeded(lambda: BioGptModel(BioGptConfig(vocab_size=20, layerdrop=0.5, **sizes)).train(), 0)


# earlier versions of transformers collect these states in the encoder: the input of a skipped layer is repeated
COLLECTS = "output_hidden_states" in signature(Wav2Vec2Encoder.forward).parameters
SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}
SERIES |= {"decoder_layerdrop": 0.0, "encoder_layerdrop": 0.5}
FSMT = {"src_vocab_size": 20, "tgt_vocab_size": 20, "langs": ["en", "de"]}

# network, inputs, kind of hidden states, its layers, what the last of the tuple goes through
NETWORKS: dict[str, tuple[Callable[[], Any], Batch, str, str, str | None]] = {
    "wav2vec2": (wav2vec2, audio(), "hidden_states", "encoder.layers", None),
    "wav2vec2, stable": (
        lambda: wav2vec2(do_stable_layer_norm=True, feat_extract_norm="layer"),
        audio(),
        "hidden_states",
        "encoder.layers",
        "encoder.layer_norm" if COLLECTS else None,  # else the last one as it is before the norm
    ),
    "bart": (two_stacks(BartModel, BartConfig), BOTH, "hidden_states", "decoder.layers", None),
    "m2m100": (two_stacks(M2M100Model, M2M100Config), BOTH, "hidden_states", "decoder.layers", "decoder.layer_norm"),
    "m2m100's encoder": (
        two_stacks(M2M100Model, M2M100Config, vocab_size=20, decoder_layerdrop=0.0, encoder_layerdrop=0.5),
        BOTH,
        "encoder_hidden_states",
        "encoder.layers",
        "encoder.layer_norm",
    ),
    "time series": (
        two_stacks(TimeSeriesTransformerModel, TimeSeriesTransformerConfig, **SERIES),
        series(),
        "encoder_hidden_states",
        "encoder.layers",
        None,
    ),
    "mvp, of full length": (two_stacks(MvpModel, MvpConfig), BOTH, "hidden_states", "decoder.layers", None),
    "biogpt, itself": (biogpt, TOKENS, "hidden_states", "layers", "layer_norm"),
}


@pytest.fixture
def skip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Choose the layers that the next forwards skip; transformers draws one number for each layer, in order."""
    chosen: list[tuple[int, ...]] = [()]
    rand, drawn = torch.rand, [0]

    def draw(*size: Any, **kwargs: Any) -> Tensor:
        if size != ([],):
            return rand(*size, **kwargs)
        layer, drawn[0] = drawn[0] % LAYERS, drawn[0] + 1
        return torch.tensor(0.0 if layer in chosen[0] else 1.0)

    monkeypatch.setattr(torch, "rand", draw)
    return lambda *layers: chosen.__setitem__(0, layers)


class Outputs:
    """Return the outputs of named modules of a network, by torch's own hooks."""

    def __init__(self, network: nn.Module, *names: str) -> None:
        self.seen: dict[str, Tensor] = {}
        self.handles = [network.get_submodule(name).register_forward_hook(self._keep(name)) for name in names]

    def _keep(self, name: str) -> Any:
        return lambda module, args, output: self.seen.update({name: output if torch.is_tensor(output) else output[0]})

    def __enter__(self) -> dict[str, Tensor]:
        return self.seen

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


def layer_names(list_name: str) -> list[str]:
    return [f"{list_name}.{i}" for i in range(LAYERS)]


def shown(reader: LayerReader, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
    with reader.reading(lambda _, features: features) as read:
        network(**batch)
    return dict(read)


# ------------------------------------------------------------------------------------------------------ whose is whose


@pytest.mark.parametrize("skipped", SKIPPED, ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_hidden_state_keeps_its_name_whichever_layers_are_skipped(
    network: str, skipped: tuple[int, ...], skip: Callable[..., None]
) -> None:
    make, batch, kind, layers, last = NETWORKS[network]
    model, names = make(), layer_names(layers)
    reader = LayerReader(model, [kind], "target")
    skip(*skipped)
    with Outputs(model, *names, *([last] if last else [])) as outputs:
        read = shown(reader, model, batch)
    ran = [i for i in range(LAYERS) if names[i] in outputs]
    assert ran == [i for i in range(LAYERS) if i not in skipped], "the test itself"
    assert list(read) == [f"{kind}.{i + 1}" for i in ran]
    for i in ran:
        expected = outputs[last if last and i == LAYERS - 1 else names[i]]
        assert torch.equal(read[f"{kind}.{i + 1}"], expected)
    assert reader.names() == [f"{kind}.{i}" for i in range(1, LAYERS + 1)], "pairs are made of all of them"


def test_a_layer_that_is_asked_for_by_its_index_keeps_it(skip: Callable[..., None]) -> None:
    model = wav2vec2()
    reader = LayerReader(model, ["hidden_states.0", "hidden_states.2", "hidden_states.3"], "target")
    skip(0, 1)
    with Outputs(model, "encoder.dropout", "encoder.layers.2") as outputs:
        read = shown(reader, model, audio())
    assert list(read) == ["hidden_states.0", "hidden_states.3"]
    assert torch.equal(read["hidden_states.0"], outputs["encoder.dropout"])
    assert torch.equal(read["hidden_states.3"], outputs["encoder.layers.2"])
    assert reader.names() == ["hidden_states.0", "hidden_states.2", "hidden_states.3"]
    skip(0, 1, 2)
    assert list(shown(reader, model, audio())) == (["hidden_states.0"] if COLLECTS else [])
    with pytest.raises(
        ValueError, match=r"target layer 'hidden_states.4' not found.*hidden_states.0 … hidden_states.3"
    ):
        shown(LayerReader(model, ["hidden_states.4"], "target"), model, audio())


@pytest.mark.parametrize("make", [wav2vec2, biogpt])
def test_an_adapted_network_skips_layers_too(make: Callable[[], Any], skip: Callable[..., None]) -> None:
    model = get_peft_model(make(), LoraConfig(target_modules=["v_proj"], r=2)).train()
    reader = LayerReader(model, ["hidden_states"], "target")
    skip(1)
    assert list(shown(reader, model, audio() if make is wav2vec2 else TOKENS)) == ["hidden_states.1", "hidden_states.3"]
    skip(0, 1, 2)
    assert shown(reader, model, audio() if make is wav2vec2 else TOKENS) == {}
    assert len(reader.names()) == LAYERS


def test_modules_by_name_are_left_out_where_their_layer_is_skipped(skip: Callable[..., None]) -> None:
    model, names = wav2vec2(), ["encoder.layers.*", "encoder.layers.*.attention", "feature_projection"]
    reader = LayerReader(model, names, "target")
    skip(0, 2)
    read = shown(reader, model, audio())
    assert set(read) == {"encoder.layers.1", "encoder.layers.1.attention", "feature_projection"}
    assert len(reader.names()) == 2 * LAYERS + 1


def test_without_layerdrop_in_what_is_read_nothing_is_hooked() -> None:
    bart = two_stacks(BartModel, BartConfig)
    for model, layers in ((wav2vec2(layerdrop=0.0), "hidden_states"), (bart(), "encoder_hidden_states")):
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        reader = LayerReader(model, [layers], "target")
        now = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        assert now == hooks + 2, "the network's own"
        assert not reader.layer_drop.settings


def test_a_copy_of_a_read_network_works_on_its_own(skip: Callable[..., None]) -> None:
    model = wav2vec2()
    reader = LayerReader(model, ["hidden_states"], "target")
    twin = copy.deepcopy(model)
    skip(1)
    with reader.reading(lambda _, features: features) as read:
        skip(0)
        twin(**audio())
        skip(1)
        model(**audio())
    assert list(read) == ["hidden_states.1", "hidden_states.3"]


def test_a_reader_that_is_removed_leaves_no_hook() -> None:
    model = wav2vec2()
    LayerReader(model, ["hidden_states", "encoder.layers.*.attention"], "target").remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_frozen_network_is_evaluated_and_skips_nothing() -> None:
    guide = wav2vec2()
    GuidanceLoss(wav2vec2(seed=1), guide)
    reader = LayerReader(guide, ["hidden_states"], "guide")
    for seed in range(5):
        torch.manual_seed(seed)
        assert len(shown(reader, guide, audio())) == LAYERS


# ------------------------------------------------------------------------------------------------------------ the loss


def guided(loss: GuidanceLoss, step: int = 0) -> tuple[Watched, dict[str, Tensor]]:
    """A watched forward of wav2vec2, guided by another, and what its layers returned."""
    with loss.watch(audio(), step=step) as watched, Outputs(loss.target, *layer_names("encoder.layers")) as outputs:
        loss.target(**watched.inputs)
    return watched, outputs


def by_hand(loss: GuidanceLoss, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Similarity of each pair of layers of one place, from what the target's layers returned."""
    with torch.no_grad():
        theirs = loss.guide(**audio(), output_hidden_states=True).hidden_states
    places = {i: outputs.get(f"encoder.layers.{i - 1}") for i in range(1, LAYERS + 1)}
    return {
        f"hidden_states.{i}~hidden_states.{i}": cka(ours, theirs[i]) for i, ours in places.items() if ours is not None
    }


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("skipped", SKIPPED[:-1], ids=str)
def test_loss_and_gradient_are_those_of_the_pairs_whose_layer_ran(
    skipped: tuple[int, ...], reduction: str, skip: Callable[..., None]
) -> None:
    config = linear(guidance_reduction=reduction, log_measures=["debiased_cka"])
    loss = GuidanceLoss(wav2vec2(), wav2vec2(seed=1), config)
    skip(*skipped)
    watched, outputs = guided(loss)
    expected = by_hand(loss, outputs)
    assert len(expected) == LAYERS - len(skipped)
    got = watched.similarities["linear_cka"]
    assert {n: v.item() for n, v in got.items()} == pytest.approx({n: v.item() for n, v in expected.items()}, abs=1e-5)
    assert watched.similarities["debiased_cka"].keys() == expected.keys()
    assert watched.skipped_pairs == len(skipped)
    total = torch.stack([1 - value for value in expected.values()])
    total = total.mean() if reduction == "mean" else total.sum()
    assert watched.loss.item() == pytest.approx(total.item(), abs=1e-5)
    parameters = [p for layer in loss.target.encoder.layers for p in layer.parameters()]
    both = [torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in (watched.loss, total)]
    assert sum(gradient is not None for gradient in both[0]) > 0
    for got_gradient, gradient in zip(*both, strict=True):
        assert (got_gradient is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(got_gradient, gradient, rtol=1e-3, atol=1e-6)


def test_pairs_are_made_of_all_layers_though_the_first_step_skips_some(skip: Callable[..., None]) -> None:
    loss = GuidanceLoss(wav2vec2(), wav2vec2(seed=1), linear())
    for step, skipped in enumerate([(0, 2), (), (1,), (0, 1, 2), (2,)]):
        skip(*skipped)
        watched, outputs = guided(loss, step)
        assert loss.pairs == [(f"hidden_states.{i}", f"hidden_states.{i}") for i in range(1, LAYERS + 1)]
        assert watched.skipped_pairs == len(skipped)
        if watched.loss is not None:
            assert watched.similarities["linear_cka"].keys() == by_hand(loss, outputs).keys()


@pytest.mark.parametrize("layers", ["hidden_states", "encoder.layers.*"])
def test_a_step_that_skips_all_layers_is_unguided(layers: str, skip: Callable[..., None]) -> None:
    loss = GuidanceLoss(wav2vec2(), wav2vec2(seed=1), linear(target_layers=[layers]))
    skip(0, 1, 2)
    watched, _ = guided(loss)  # the first step, from which the pairs are made
    assert watched.loss is None
    assert (watched.skipped_pairs, len(loss.pairs)) == (LAYERS, LAYERS)
    assert watched.total(torch.tensor(1.0)).item() == 1
    skip()
    assert guided(loss)[0].skipped_pairs == 0


@pytest.mark.parametrize(
    "pairs",
    [["hidden_states.3~hidden_states.3", "hidden_states.1~hidden_states.1"], ["encoder.layers.2~hidden_states.3"]],
)
def test_pairs_that_are_named_are_left_out_alike(pairs: list[str], skip: Callable[..., None]) -> None:
    loss = GuidanceLoss(wav2vec2(), wav2vec2(seed=1), linear(layer_pairs=pairs))
    skip(1)
    watched, outputs = guided(loss)
    expected = by_hand(loss, outputs)["hidden_states.3~hidden_states.3"].item()
    assert watched.similarities["linear_cka"][pairs[0]].item() == pytest.approx(expected, abs=1e-5)
    assert watched.skipped_pairs == 0
    skip(2)
    watched, _ = guided(loss)
    assert watched.skipped_pairs == 1
    assert watched.similarities.get("linear_cka", {}).keys() == set(pairs[1:])


def test_pairs_of_weight_0_that_are_left_guide_no_step(skip: Callable[..., None]) -> None:
    pairs = ["hidden_states.3~hidden_states.3", "hidden_states.1~hidden_states.1@0"]
    config = linear(layer_pairs=pairs, guidance_reduction="mean", measure="linear_cka")
    loss = GuidanceLoss(wav2vec2(), wav2vec2(seed=1), config)
    skip(1)
    watched, outputs = guided(loss)
    expected = by_hand(loss, outputs)["hidden_states.3~hidden_states.3"].item()
    assert watched.loss.item() == pytest.approx(1 - expected, abs=1e-5)
    skip(2)
    watched, _ = guided(loss)
    assert watched.loss is None
    assert watched.why_unguided.startswith("LayerDrop skipped the target layers of all pairs with a weight above 0 (")


def test_a_step_that_skips_the_only_trainable_layers_is_no_error(skip: Callable[..., None]) -> None:
    target = biogpt()
    target.requires_grad_(False).layers[2].requires_grad_(True)
    loss = GuidanceLoss(target, llama(vocabulary=20))
    skip(2)
    with loss.watch(TOKENS) as watched:
        target(**watched.inputs)
    assert watched.loss is None
    assert "carries a gradient to a weight" in watched.why_unguided


def test_layers_that_are_frozen_behind_an_input_with_a_gradient_are_an_error() -> None:
    target = wav2vec2(make=Wav2Vec2ForSequenceClassification, layerdrop=0.0)
    target.freeze_base_model()  # whose feature encoder lets its output carry a gradient all the same
    loss = GuidanceLoss(target, wav2vec2(seed=1), linear())
    words = "carries a gradient to a weight: they are frozen"
    with pytest.raises(ValueError, match=words), loss.watch(audio()) as watched:
        target(**watched.inputs)


def test_layerdrop_that_changes_after_the_layers_were_found_is_an_error() -> None:
    target = wav2vec2(layerdrop=0.0)
    loss = GuidanceLoss(target, wav2vec2(seed=1), linear())
    target.config.layerdrop = 0.4
    with pytest.raises(
        ValueError, match=r"the layerdrop of \w+ was 0 when guidance looked .*, but now it is 0\.4: set it"
    ):
        guided(loss)


def test_activation_checkpointing_does_not_change_what_ran(skip: Callable[..., None]) -> None:
    target = wav2vec2()
    target.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = GuidanceLoss(target, wav2vec2(seed=1), linear())
    skip(1)
    watched, outputs = guided(loss)
    assert watched.similarities["linear_cka"].keys() == by_hand(loss, outputs).keys()
    skip(0, 1, 2)
    watched.loss.backward()
    assert target.encoder.layers[2].attention.v_proj.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_a_compiled_target_skips_layers_too() -> None:
    loss = GuidanceLoss(wav2vec2(), wav2vec2(seed=1), linear())
    outputs = Outputs(loss.target, *layer_names("encoder.layers")).seen  # hooks are compiled, too: one for all steps
    loss.target.compile(backend="aot_eager")
    skipped = set()
    for seed in range(8):
        torch.manual_seed(seed)
        outputs.clear()
        watched, _ = guided(loss, seed)
        assert watched.skipped_pairs == LAYERS - len(outputs)
        expected = {name: value.item() for name, value in by_hand(loss, outputs).items()}
        got = {name: value.item() for name, value in watched.similarities.get("linear_cka", {}).items()}
        assert got == pytest.approx(expected, abs=1e-4)
        skipped.add(watched.skipped_pairs)
    assert len(skipped) > 2


def test_a_map_of_similarities_shows_all_layers() -> None:
    target, guide = wav2vec2(), wav2vec2(seed=1)
    found = similarity_map(target, guide, linear(), audio())
    assert found["target_layers"] == [f"hidden_states.{i}" for i in range(1, LAYERS + 1)]
    assert len(found["pairs"]) == LAYERS
    assert target.training


# --------------------------------------------------------------------------------------------------------- in words


class Unused(Wav2Vec2Model):
    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__(config)
        self.unused = nn.Linear(2, 2)
        self.encoder.layers[1].unused = nn.Linear(2, 2)


@pytest.mark.parametrize("name", ["unused", "encoder.layers.1.unused"])
def test_a_module_that_never_runs_is_an_error_as_soon_as_it_is_known(name: str, skip: Callable[..., None]) -> None:
    model = wav2vec2(make=Unused)
    reader = LayerReader(model, [name, "encoder.layers.*"], "target")
    skip(0)
    shown(reader, model, audio())
    with pytest.raises(ValueError, match=rf"target layers \['{name}'\] did not run in the target's forward: leave"):
        reader.names()


class SkipsByItself(nn.Module):
    """A network that leaves a layer out without saying so."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.other = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.skips = False

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.one(self.embed(input_ids))
        return x if self.skips else self.other(x)


def test_words_when_a_layer_is_missing_in_a_network_without_layerdrop() -> None:
    target = seeded(SkipsByItself, 0)
    loss = GuidanceLoss(target, llama(layers=2, vocabulary=20), linear(target_layers=["one", "other"]))
    with loss.watch(TOKENS) as watched:
        target(**watched.inputs)
    assert watched.loss > 0
    target.skips = True
    with pytest.raises(ValueError, match=r"target layers \['other'\] did not run in the target's forward"):  # noqa: SIM117
        with loss.watch(TOKENS) as watched:
            target(**watched.inputs)


def test_words_when_the_target_does_not_run() -> None:
    loss = GuidanceLoss(wav2vec2(), wav2vec2(seed=1), linear())
    with pytest.raises(ValueError, match="the target did not run inside `watch`"), loss.watch(audio()):
        pass


@pytest.mark.parametrize("batch", ["global", "accumulated"])
@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (wav2vec2, "layerdrop"),
        (two_stacks(BartModel, BartConfig), "decoder_layerdrop"),
        (two_stacks(FSMTModel, FSMTConfig, **FSMT), "decoder_layerdrop"),
    ],
)
def test_a_similarity_over_several_batches_is_refused(make: Callable[[], Any], setting: str, batch: str) -> None:
    words = (
        rf"similarity_batch='{batch}' .* LayerDrop .* \({setting}=0.5\): build the target with {setting}=0, or use "
        "similarity_batch='local'"
    )
    with pytest.raises(ValueError, match=words):
        GuidanceLoss(make(), llama(), linear(similarity_batch=batch))


def test_micro_batches_taken_as_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"similarity_batch='accumulated' .* LayerDrop"):
        Accumulated(GuidanceLoss(wav2vec2(), wav2vec2(seed=1)), [audio(), audio(seed=1)])


def test_a_similarity_over_several_batches_of_layers_that_are_never_skipped_is_not_refused() -> None:
    config = linear(similarity_batch="accumulated", target_layers=["encoder_hidden_states"])
    GuidanceLoss(two_stacks(BartModel, BartConfig)(), llama(), config)


def test_layers_that_cannot_be_told_apart_are_refused_unless_they_are_named(skip: Callable[..., None]) -> None:
    config = FlaubertConfig(vocab_size=20, emb_dim=8, n_layers=LAYERS, n_heads=2, layerdrop=0.5)
    target = seeded(lambda: FlaubertModel(config).train(), 0)
    words = r"the target \(FlaubertModel\) skips .*\(layerdrop=0.5\).* with layerdrop=0, or name modules with target_la"
    with pytest.raises(ValueError, match=words):
        LayerReader(target, ["hidden_states"], "target")
    reader = LayerReader(target, ["ffns.*"], "target")
    skip(1)
    assert set(shown(reader, target, TOKENS)) == {"ffns.0", "ffns.2"}


class ShowsLess(Wav2Vec2Model):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.hidden_states = outputs.hidden_states[:2]
        return outputs


def test_another_number_of_hidden_states_than_of_layers_is_refused(skip: Callable[..., None]) -> None:
    model = wav2vec2(make=ShowsLess)
    skip(0)
    words = (
        r"the target returned 2 hidden_states, but 2 of the 3 layers encoder.layers.0 … encoder.layers.2 ran, "
        r"so 3 or 4 were expected.*"
        "build the target with layerdrop=0, or name modules with target_layers"
    )
    with pytest.raises(ValueError, match=words):
        shown(LayerReader(model, ["hidden_states"], "target"), model, audio())


# --------------------------------------------------------------------------------------------------------- a whole run


def classifier() -> Any:
    return wav2vec2(make=Wav2Vec2ForSequenceClassification, num_labels=2)


def rows(count: int = 16) -> list[dict[str, Any]]:
    values = audio(count)["input_values"]
    return [{"input_values": values[i], "labels": i % 2} for i in range(count)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_trains_and_counts_the_pairs_that_are_left_out(tmp_path: Path, accumulation: int) -> None:
    target, ran = classifier(), []
    for layer in target.wav2vec2.encoder.layers:
        layer.register_forward_hook(lambda module, args, output: ran[-1].append(1) if module.training else None)
    # the look at the first batch also runs the target in evaluation mode
    target.register_forward_pre_hook(lambda module, args: ran.append([]) if module.training else None)
    args = arguments(tmp_path, max_steps=8, gradient_accumulation_steps=accumulation)
    trainer = GuidanceTrainer(target, args, train_dataset=rows(), guide=wav2vec2(seed=1))
    before = weights(target)
    trainer.train()
    assert not same(before, weights(target))
    logs = train_logs(trainer)
    steps = [ran[i : i + accumulation] for i in range(0, len(ran), accumulation)]
    skipped = [sum(LAYERS - len(one) for one in step) for step in steps]
    assert [log.get("guidance/skipped_pairs", 0) for log in logs] == skipped
    assert 0 < sum(skipped) < LAYERS * len(ran)
    unguided = [sum(not one for one in step) for step in steps]
    assert [log.get("guidance/skipped_batches", 0) for log in logs] == unguided
    assert ["guidance/loss" in log for log in logs] == [count < accumulation for count in unguided]


def test_of_weight_zero_a_run_is_that_of_a_plain_trainer(tmp_path: Path) -> None:
    plain, guided = classifier(), classifier()
    Trainer(plain, arguments(tmp_path), train_dataset=rows()).train()
    config = linear(guidance_weight=0.0)
    GuidanceTrainer(guided, arguments(tmp_path), train_dataset=rows(), guide=wav2vec2(seed=1), guidance=config).train()
    assert same(weights(plain), weights(guided))


def test_a_rate_of_zero_is_watched_and_skips_nothing() -> None:
    found = {rate: LayerDrop(model := wav2vec2(layerdrop=rate), model, ["hidden_states"], []) for rate in (0.0, 0.5)}
    assert [drop.has_rate for drop in found.values()] == [True, True]
    assert found[0.0].settings == {}
    assert found[0.5].settings == {"layerdrop": 0.5}
    plain = gpt2()
    assert not LayerDrop(plain, plain, ["hidden_states"], []).has_rate
    found[0.0].check_similarity_batch("global")
    with pytest.raises(ValueError, match=r"LayerDrop skips other layers in each of them \(layerdrop=0.5\)"):
        found[0.5].check_similarity_batch("global")
