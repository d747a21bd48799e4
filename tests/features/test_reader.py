"""Reading layers: hidden states of every convention, and modules by name, glob and type."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import gpt2, seeded, t5, token_batch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    BertConfig,
    FalconMambaConfig,
    GPT2LMHeadModel,
    MambaConfig,
    ModernBertConfig,
    PatchTSMixerConfig,
    PoolFormerConfig,
    PreTrainedConfig,
    ResNetConfig,
    RwkvConfig,
    T5Config,
    TimmWrapperConfig,
    ViTConfig,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from hf_guidance.features.hidden_states import first_tensor
from hf_guidance.features.modules import find_modules
from hf_guidance.features.reader import LayerReader, not_recomputed
from hf_guidance.targets import RNNConfig

Batch = dict[str, Tensor]
IDS = torch.randint(3, 17, (4, 6), generator=torch.Generator().manual_seed(0))
TEXT: Batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
IMAGES: Batch = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def read(reader: LayerReader, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The layers of one forward, as they are."""
    with reader.reading(lambda name, output: output.detach().clone()) as layers:
        model(*args, **kwargs)
    return dict(layers)


def layers_of(model: nn.Module, *layers: str, **batch: Any) -> dict[str, Tensor]:
    return read(LayerReader(model, layers, "target"), model, **batch)


def outputs_of(model: nn.Module, *names: str, **batch: Any) -> list[Tensor]:
    """Return the outputs of the named modules, by torch's own hooks on a copy."""
    model, seen = copy.deepcopy(model), {}
    for name in names:
        hook = lambda module, args, output, name=name: seen.update({name: output})  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    model(**batch)
    return [seen[name] if torch.is_tensor(seen[name]) else seen[name][0] for name in names]


# ---------------------------------------------------------------------------------------------------- hidden states

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 17}
ATTENTION = {"num_attention_heads": 2, "intermediate_size": 16}
T5_SIZES = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "vocab_size": 17, "dropout_rate": 0.0}
STAGES = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}

ENDS_TWICE = ("mamba", "falcon_mamba", "rwkv")
# config, batch, the module whose output is the first hidden state read, number of hidden states read
NETWORKS: dict[str, tuple[PreTrainedConfig, Batch, str, int]] = {
    "gpt2": (gpt2().config, TEXT, "h.0", 2),
    "bert": (BertConfig(**SMALL, **ATTENTION), TEXT, "encoder.layer.0", 2),
    "modernbert": (
        ModernBertConfig(
            **SMALL, **ATTENTION, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
        ),
        TEXT,
        "layers.0",
        2,
    ),
    "t5": (
        T5Config(**T5_SIZES, num_layers=1, num_decoder_layers=3),
        {**TEXT, "decoder_input_ids": IDS[:, :5]},
        "decoder.block.0",
        3,
    ),
    "rnn": (RNNConfig(**SMALL), {"input_ids": IDS}, "layers.0", 2),
    # these return no embeddings, and the last layer once more behind its norm
    "mamba": (MambaConfig(**SMALL, state_size=4), TEXT, "layers.0", 2),
    "falcon mamba": (FalconMambaConfig(**SMALL, state_size=4), TEXT, "layers.0", 2),
    "rwkv": (RwkvConfig(**SMALL, attention_hidden_size=8), {"input_ids": IDS}, "blocks.0", 2),
    "patchtsmixer": (
        PatchTSMixerConfig(context_length=32, num_layers=3, d_model=8, num_input_channels=2, patch_length=8),
        {"past_values": torch.randn(4, 32, 2, generator=torch.Generator().manual_seed(0))},
        "encoder.mlp_mixer_encoder.mixers.0",
        3,
    ),
    "vit": (
        ViTConfig(hidden_size=8, num_hidden_layers=2, **ATTENTION, image_size=32, patch_size=8),
        IMAGES,
        "layers.0",
        2,
    ),
    "resnet": (ResNetConfig(embedding_size=8, **STAGES), IMAGES, "encoder.stages.0", 4),
    "poolformer": (PoolFormerConfig(**STAGES), IMAGES, "encoder.block.0.0", 4),
    "timm resnet": (TimmWrapperConfig(architecture="resnet10t"), IMAGES, "timm_model.act1", 5),
    "timm vit": (
        TimmWrapperConfig(
            architecture="vit_tiny_patch16_224",
            model_args={"depth": 2, "embed_dim": 24, "img_size": 32, "patch_size": 8},
        ),
        IMAGES,
        "timm_model.blocks.0",
        2,
    ),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Batch, str, int]:
    config, batch, first, count = NETWORKS[request.param]
    return seeded(lambda: AutoModel.from_config(config), 0).eval(), batch, first, count


def test_hidden_states_are_all_the_network_returns_but_the_embeddings(
    network: tuple[nn.Module, Batch, str, int],
) -> None:
    model, batch, first, count = network
    outputs = model(**batch, output_hidden_states=True)
    states = outputs.hidden_states if "hidden_states" in outputs else outputs.decoder_hidden_states
    layers = layers_of(model, "hidden_states", **batch)
    starts = 0 if model.config.model_type in ENDS_TWICE else len(states) - count
    assert list(layers) == [f"hidden_states.{i}" for i in range(starts, starts + count)]
    for name, layer in layers.items():
        torch.testing.assert_close(layer, states[int(name.split(".")[1])])
    (expected,) = outputs_of(model, first, **batch)
    first_read = next(iter(layers.values()))
    if expected.ndim < first_read.ndim:  # timm shows a block's tokens as an image, the class token left out
        expected = expected[:, 1:].mT.reshape(first_read.shape)
    torch.testing.assert_close(first_read, expected)


def test_embeddings_are_read_where_they_are_named() -> None:
    model = gpt2()
    layers = layers_of(model, "hidden_states.0", "hidden_states.2", input_ids=IDS)
    transformer = model.transformer
    assert list(layers) == ["hidden_states.0", "hidden_states.2"]
    torch.testing.assert_close(layers["hidden_states.0"], transformer.wte(IDS) + transformer.wpe(torch.arange(6)))


@pytest.mark.parametrize("layer", ["encoder_hidden_states", "encoder_hidden_states.1"])
def test_an_encoders_hidden_states_are_read_where_they_are_named(layer: str) -> None:
    model, batch = t5().eval(), {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    layers = layers_of(model, layer, **batch)
    assert list(layers) == [f"encoder_hidden_states.{i}" for i in ((1,) if "." in layer else (1, 2))]
    torch.testing.assert_close(layers["encoder_hidden_states.1"], outputs_of(model, "encoder.block.0", **batch)[0])


def test_a_causal_model_with_a_head_and_labels_shows_the_same_as_its_base() -> None:
    model = gpt2()
    headed = layers_of(model, "hidden_states", input_ids=IDS, labels=IDS)
    bare = layers_of(model.transformer, "hidden_states", input_ids=IDS)
    assert all(torch.equal(headed[name], bare[name]) for name in ("hidden_states.1", "hidden_states.2"))


def test_hidden_states_are_read_whatever_the_caller_and_the_config_ask_for() -> None:
    model = gpt2()
    plain = layers_of(model, "hidden_states", input_ids=IDS)
    refused = layers_of(model, "hidden_states", input_ids=IDS, output_hidden_states=False)
    model.config.output_hidden_states = True
    asked = layers_of(model, "hidden_states", input_ids=IDS)
    assert list(plain) == list(refused) == list(asked)
    assert all(torch.equal(plain[name], refused[name]) and torch.equal(plain[name], asked[name]) for name in plain)


class Selective(nn.Module):
    """Returns hidden states as models do that are asked for some only."""

    def __init__(self, as_dict: bool = False) -> None:
        super().__init__()
        self.as_dict = as_dict

    def forward(self, x: Tensor, output_hidden_states: bool = False) -> Any:
        states = (x, None, x + 2) if output_hidden_states else None
        return {"hidden_states": states} if self.as_dict else BaseModelOutput(hidden_states=states)


@pytest.mark.parametrize("as_dict", [False, True])
def test_hidden_states_that_were_left_out_are_passed_over(as_dict: bool) -> None:
    x = torch.ones(2, 3)
    assert list(layers_of(Selective(as_dict), "hidden_states", x=x)) == ["hidden_states.2"]


@pytest.mark.parametrize("index", [1, 3])
def test_a_hidden_state_that_is_not_there_is_an_error(index: int) -> None:
    words = rf"guide layer 'hidden_states.{index}' not found; the guide returned hidden_states.0 … hidden_states.2"
    model = Selective()
    reader = LayerReader(model, [f"hidden_states.{index}"], "guide")
    with pytest.raises(ValueError, match=words):
        read(reader, model, torch.ones(2, 3))


def test_a_network_without_such_hidden_states_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"the target \(\w+\) returned no encoder_hidden_states\. If it has layers at all, name"
    ):
        layers_of(gpt2(), "encoder_hidden_states", input_ids=IDS)


def test_a_network_that_returns_plain_tuples_is_an_error() -> None:
    model = gpt2()
    with pytest.raises(
        ValueError, match=r"the target \(\w+\) returned no hidden_states, as a tuple has no names: set config"
    ):
        layers_of(model, "hidden_states", input_ids=IDS, return_dict=False)
    assert list(layers_of(model, "transformer.h.0", input_ids=IDS, return_dict=False)) == ["transformer.h.0"]


class AnyKeywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt2()

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


@pytest.mark.parametrize("model", [nn.LSTM(4, 4), AnyKeywords()], ids=lambda model: type(model).__name__)
def test_a_module_that_takes_no_output_hidden_states_must_name_its_layers(model: nn.Module) -> None:
    words = rf"the guide \({type(model).__name__}\) takes no output_hidden_states; name its layers with guide_layers"
    with pytest.raises(ValueError, match=words):
        LayerReader(model, ["hidden_states"], "guide")


# ---------------------------------------------------------------------------------------------------- named modules


def test_modules_show_what_they_return() -> None:
    names = ["transformer.h.0.mlp", "transformer.h.0.attn", "transformer.h.1"]
    model = gpt2().eval()
    layers = layers_of(model, *names, input_ids=IDS)
    for name, expected in zip(names, outputs_of(model, *names, input_ids=IDS), strict=True):
        torch.testing.assert_close(layers[name], expected)


def test_a_layer_named_twice_is_read_once_and_hidden_states_may_stand_beside_modules() -> None:
    model = gpt2()
    reader = LayerReader(model, ["transformer.h.1", "transformer.h.*", "hidden_states.1"], "target")
    assert set(read(reader, model, IDS)) == {"transformer.h.0", "transformer.h.1", "hidden_states.1"}
    assert reader.names() == ["hidden_states.1", "transformer.h.1", "transformer.h.0"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.unused = nn.Embedding(17, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 5)
        self.head = nn.Linear(5, 17)

    def forward(self, input_ids: Tensor, times: int = 1) -> Tensor:
        for _ in range(times):
            hidden, _ = self.lstm(self.embed(input_ids))
        return self.head(hidden)


def test_of_an_lstm_in_a_plain_module_the_outputs_are_read() -> None:
    model = Recurrent()
    layers = layers_of(model, "LSTM", input_ids=IDS)
    torch.testing.assert_close(layers["lstm"], model.lstm(model.embed(IDS))[0].detach())


def test_a_module_that_runs_twice_in_one_forward_is_an_error() -> None:
    model = Recurrent()
    with pytest.raises(ValueError, match=r"target layer 'lstm' ran more than once in one forward, .* or use hidden_st"):
        layers_of(model, "lstm", input_ids=IDS, times=2)


def test_a_module_that_does_not_run_is_an_error() -> None:
    model = Recurrent()
    reader = LayerReader(model, ["Linear", "lstm"], "guide")
    read(reader, model, IDS)
    with pytest.raises(
        ValueError, match=r"guide layers \['unused'\] did not run in the guide's forward: leave them out"
    ):
        reader.names()


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("transformer.h.14", "guide layer 'transformer.h.14' not found; the guide has "),
        ("transformer.h.14", r"2 GPT2Block \(transformer.h.0 … transformer.h.1\)"),
        ("transformer.h.14", r"Did you mean 'transformer.h.1'\?"),
        ("GPT2Blok", r"Did you mean 'GPT2Block'\?"),
        ("hidden_states.-1", "guide layer 'hidden_states.-1' not found"),
        ("", "guide layer '' not found"),
    ],
)
def test_a_layer_that_is_not_there_is_an_error_that_lists_those_that_are(layer: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LayerReader(gpt2(), [layer], "guide")


def test_a_guide_without_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"guide layer 'Linear' not found; the guide has no modules\.$"):
        LayerReader(nn.Linear(2, 2), ["Linear"], "guide")


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (torch.ones(2), torch.ones(2)),
        ((None, (torch.ones(2), torch.zeros(3))), torch.ones(2)),
        (BaseModelOutput(last_hidden_state=torch.ones(2), hidden_states=(torch.zeros(3),)), torch.ones(2)),
        ({"mask": None, "out": torch.ones(2)}, torch.ones(2)),
    ],
    ids=["tensor", "nested tuple", "model output", "dict"],
)
def test_the_first_tensor_of_an_output_is_its_features(output: Any, expected: Tensor) -> None:
    assert torch.equal(first_tensor(output), expected)


@pytest.mark.parametrize("output", [(), {}, (None,)])
def test_an_output_without_tensors_has_no_features(output: Any) -> None:
    assert first_tensor(output) is None


def test_a_packed_sequence_is_an_error() -> None:
    packed = pack_padded_sequence(torch.ones(2, 3, 1), torch.tensor([3, 2]), batch_first=True)
    with pytest.raises(
        ValueError, match="a packed sequence has no batch axis: choose a layer after the sequence is unpacked"
    ):
        first_tensor((packed, None))


# ------------------------------------------------------------------------------------------------------------- PEFT


@pytest.fixture
def peft_model() -> nn.Module:
    return get_peft_model(
        gpt2(), LoraConfig(target_modules=["c_fc"], r=2, init_lora_weights=False, fan_in_fan_out=True)
    )


def test_a_peft_model_is_read_by_the_names_of_its_base_model(peft_model: nn.Module) -> None:
    layers = layers_of(peft_model, "hidden_states", "transformer.h.*.mlp", input_ids=IDS)
    assert list(layers) == ["transformer.h.0.mlp", "transformer.h.1.mlp", "hidden_states.1", "hidden_states.2"]
    expected = peft_model(input_ids=IDS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(layers["hidden_states.2"], expected[2])
    assert not torch.allclose(expected[2], layers_of(gpt2(), "hidden_states.2", input_ids=IDS)["hidden_states.2"])


def test_a_layer_a_peft_model_lacks_is_described_without_its_wrappers(peft_model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"the target has transformer \(GPT2Model\)"):
        LayerReader(peft_model, ["base_model.model.transformer.h.0"], "target")


# ------------------------------------------------------------------------------------------------------------ hooks


def test_outside_reading_the_hooks_do_nothing() -> None:
    model = gpt2()
    reader, calls = LayerReader(model, ["hidden_states", "GPT2Block"], "target"), []
    with reader.reading(lambda name, output: calls.append(name) or output):
        model(IDS)
    assert len(calls) == 4
    assert model(IDS).hidden_states is None
    with pytest.raises(RuntimeError, match="stop"), reader.reading(lambda name, output: calls.append(name) or output):
        raise RuntimeError("stop")
    model(IDS)
    assert len(calls) == 4


def test_each_reading_starts_empty() -> None:
    model = gpt2()
    reader = LayerReader(model, ["GPT2Block"], "target")
    first, second = read(reader, model, IDS), read(reader, model, IDS.flip(0))
    assert list(first) == list(second)
    assert not torch.equal(first["transformer.h.1"], second["transformer.h.1"])


def test_only_the_layers_that_are_kept_are_reduced() -> None:
    model = gpt2()
    reader = LayerReader(model, ["hidden_states", "GPT2Block"], "target")
    reader.keep = {"hidden_states.2", "transformer.h.0"}
    assert set(read(reader, model, IDS)) == reader.keep


def test_removing_the_reader_takes_every_hook_off() -> None:
    model = gpt2()
    LayerReader(model, ["hidden_states", "transformer.**"], "target").remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_reader_that_could_not_be_made_leaves_no_hook() -> None:
    model = gpt2()
    with pytest.raises(ValueError, match="not found"):
        LayerReader(model, ["hidden_states", "GPT2Block", "nowhere"], "target")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_read_carries_the_gradient() -> None:
    model = gpt2()
    with LayerReader(model, ["transformer.h.0", "hidden_states.1"], "target").reading(
        lambda _, output: output
    ) as layers:
        model(IDS)
    first = model.transformer.h[0].mlp.c_fc.weight
    gradients = [torch.autograd.grad(layer.square().sum(), first, retain_graph=True)[0] for layer in layers.values()]
    assert gradients[0].norm() > 0
    assert torch.equal(*gradients)


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.relu = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.linear(x))


def test_a_relu_in_place_after_a_layer_does_not_change_what_was_read() -> None:
    model, x = Overwriting(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    before = model.linear(x)
    with LayerReader(model, ["linear"], "target").reading(lambda _, output: output @ output.T) as layers:
        model(x).sum()
    assert (before < 0).any()
    torch.testing.assert_close(layers["linear"], before @ before.T)


class Checkpointed(nn.Module):
    """Blocks that torch itself checkpoints, hooks and all."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = input_ids[..., :4].float()
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def checkpointed_gpt2() -> GPT2LMHeadModel:
    model = gpt2().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (checkpointed_gpt2, ["hidden_states", "GPT2Block", "**.ln_1"]),
        (Checkpointed, ["h.*", "Linear"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_activation_checkpointing_that_repeats_a_layer_does_not_read_it_again(
    make: Callable[[], nn.Module], layers: list[str]
) -> None:
    model, forwards, calls = seeded(make, 0), [], []
    inner = next(iter(find_modules(model, layers[-1]).values()))
    inner.register_forward_hook(lambda *_: forwards.append(1))
    reader = LayerReader(model, layers, "target")
    with reader.reading(lambda name, output: calls.append(name) or output.detach()):
        outputs = model(IDS)
    (outputs if torch.is_tensor(outputs) else outputs.logits).sum().backward()
    assert len(forwards) == 2  # it did run again
    assert sorted(calls) == sorted(set(calls))


def test_a_copy_of_a_read_network_works_on_its_own() -> None:
    model = gpt2()
    reader = LayerReader(model, ["hidden_states", "GPT2Block"], "target")
    twin = copy.deepcopy(model)
    assert set(read(reader, model, IDS)) == {"transformer.h.0", "transformer.h.1", "hidden_states.1", "hidden_states.2"}
    torch.testing.assert_close(twin(IDS).logits, model(IDS).logits)


# --------------------------------------------------------------------------------------------- heads of other trainers


class FusedHead(nn.Module):
    """A language model whose head drops the hidden states, as TRL's fused one does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt2()
        self.base_model = self.inner.transformer
        self.config = self.inner.config

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False, **kwargs: Any) -> Any:
        found = self.base_model(input_ids, output_hidden_states=output_hidden_states)
        return CausalLMOutput(logits=self.inner.lm_head(found.last_hidden_state))


def test_hidden_states_that_the_head_drops_are_those_of_the_backbone() -> None:
    target, batch = FusedHead(), token_batch()
    reader = LayerReader(target, ["hidden_states"], "target")
    with reader.reading(lambda _, x: x) as read:
        target(batch["input_ids"])
    expected = target.base_model(batch["input_ids"], output_hidden_states=True).hidden_states[1:]
    assert list(read) == ["hidden_states.1", "hidden_states.2"]
    for got, wanted in zip(read.values(), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("layers", [["hidden_states"], ["transformer.h.*"]])
def test_more_forwards_without_gradients_are_not_read(layers: list[str]) -> None:
    target, batch = gpt2(), token_batch()
    reader = LayerReader(target, layers, "target")
    with reader.reading(lambda _, x: x) as read:
        with torch.no_grad():
            target(batch["input_ids"].flip(0))  # a reference, before
        outputs = target(batch["input_ids"])
        with torch.no_grad():
            again = target(batch["input_ids"].flip(0))  # for metrics, after
    assert len(read) == 2
    assert all(features.requires_grad for features in read.values())
    assert "hidden_states" not in again
    assert outputs.hidden_states is None or len(outputs.hidden_states) == 3


def test_a_method_of_a_trainer_in_the_forwards_place_asks_the_backbone_for_hidden_states() -> None:
    model = gpt2()
    forward = model.forward

    def fused(network: nn.Module, ids: Tensor) -> Tensor:
        """As TRL calls a method of its own, which has no argument for hidden states, through the model's hooks."""
        model.forward = forward
        return network.transformer(input_ids=ids).last_hidden_state.sum()

    reader = LayerReader(model, ["hidden_states"], "target")
    model.forward = fused
    with reader.reading(lambda name, features: tuple(features.shape)) as read:
        model(model, IDS)
        assert read == dict.fromkeys(("hidden_states.1", "hidden_states.2"), (*IDS.shape, 8))


@pytest.mark.parametrize("reentrant", [False, True])
def test_features_inside_a_checkpoint_are_read_once_and_refused_where_they_have_no_gradient(reentrant: bool) -> None:
    layer, seen = nn.Linear(3, 3), []
    reduce = not_recomputed(lambda name, features: seen.append(features.square().sum()))

    def run(x: Tensor) -> Tensor:
        features = layer(x)
        if not seen:
            reduce("layer", features)
        return features

    x = torch.randn(2, 3, requires_grad=True)
    if reentrant:
        with pytest.raises(ValueError, match=r"target layer 'layer' ran without gradients .* Set use_reentrant=False"):
            checkpoint(run, x, use_reentrant=True)
        return
    output = checkpoint(run, x, use_reentrant=False)
    (output.sum() + seen[0]).backward()
    expected = torch.autograd.grad(layer(x).sum() + layer(x).square().sum(), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, expected)
