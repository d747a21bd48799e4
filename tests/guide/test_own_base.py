"""A target's own base as its guide: the same values as a copy of the base, and a target that is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import NormNet, gpt2, linear, llama_config, seeded, token_batch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from hf_guidance import GuidanceConfig, GuidanceLoss, load_guide, load_guide_of_base
from hf_guidance.guide.freezing import check_apart, freeze
from hf_guidance.guide.identity import fingerprint, identity
from hf_guidance.guide.own_base import OwnBase, adapters_in

LORA: dict[str, Any] = {"r": 2, "lora_dropout": 0.3, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def lora(**changes: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **LORA, **changes})


def base() -> LlamaForCausalLM:
    config = llama_config()
    config.attention_dropout = 0.3
    return seeded(lambda: LlamaForCausalLM(config), 1)


def adapted(config: peft.PeftConfig | None = None) -> peft.PeftModel:
    return seeded(lambda: peft.get_peft_model(base(), config or lora()), 0)


def two_adapters() -> nn.Module:
    target = adapted()
    seeded(lambda: target.add_adapter("second", lora(target_modules=["o_proj"])), 2)
    target.base_model.set_adapter(["default", "second"])
    return target


def injected() -> nn.Module:
    """A network of transformers that holds adapters itself, without PEFT's wrapper around it."""
    target = base()
    return seeded(lambda: peft.inject_adapter_in_model(lora(task_type=None), target), 0)


def frozen_adapter() -> nn.Module:
    """A target with an adapter that is active but not trained, beside one that is."""
    target = two_adapters()
    for name, weight in target.named_parameters():
        if "second" in name:
            weight.requires_grad_(False)
    return target


KINDS: dict[str, Callable[[], nn.Module]] = {
    "LoRA": adapted,
    "DoRA and biases of no layer": lambda: adapted(lora(use_dora=True)),
    "a trained head and embeddings": lambda: adapted(lora(modules_to_save=["lm_head", "embed_tokens"])),
    "trained tokens": lambda: adapted(lora(trainable_token_indices=[1, 2])),
    "IA3": lambda: adapted(peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False)),
    "LoHa": lambda: adapted(peft.LoHaConfig(target_modules=["q_proj"], r=2, init_weights=False)),
    "two adapters": two_adapters,
    "a frozen adapter": frozen_adapter,
    "injected": injected,
}


def state_of(network: nn.Module) -> dict[str, Any]:
    """All that a guide's forward may not change."""
    return {
        "weights": {name: value.clone() for name, value in network.state_dict().items()},
        "buffers": {name: value.clone() for name, value in network.named_buffers()},
        "trained": {name: value.requires_grad for name, value in network.named_parameters()},
        "modes": {name: module.training for name, module in network.named_modules()},
        "off": {name: module.disable_adapters for name, (module, _) in adapters_in(network).items()},
        "active": {name: list(module.active_adapters) for name, (module, _) in adapters_in(network).items()},
        "gradients": {name: value.grad for name, value in network.named_parameters()},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name in ("weights", "buffers"):
        assert before[name].keys() == after[name].keys()
        assert all(torch.equal(value, after[name][key]) for key, value in before[name].items())
    for name in ("trained", "modes", "off", "active", "gradients"):
        assert before[name] == after[name]


def gradients_by(target: nn.Module, guide: nn.Module, config: GuidanceConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Guidance loss on one batch, and its gradient in the trained weights, with the same dropout every time."""
    guidance = GuidanceLoss(target, guide, config)
    torch.manual_seed(5)
    batch = token_batch()
    with guidance.watch(batch) as watched:
        target(**watched.inputs)
    guidance.close()
    assert watched.loss is not None
    weights = {name: value for name, value in target.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(watched.loss, list(weights.values()), allow_unused=True)
    return watched.loss, {
        name: torch.zeros_like(weights[name]) if slope is None else slope
        for name, slope in zip(weights, found, strict=True)
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [["hidden_states"], ["model.layers.*"]])
def test_loss_and_gradients_are_those_of_a_frozen_copy_of_the_base(kind: str, layers: list[str]) -> None:
    config = linear(target_layers=layers, guide_layers=layers)
    target = KINDS[kind]().train()
    before = state_of(target)
    loss, slopes = gradients_by(target, load_guide_of_base(target), config)
    assert_same(before, state_of(target))
    expected_loss, expected = gradients_by(target, base(), config)
    assert loss > 1e-4, "the target differs from its base"
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slopes, expected, rtol=1e-6, atol=1e-6)
    assert any(slope.abs().max() > 1e-6 for slope in slopes.values())


@pytest.mark.parametrize("layers", [["hidden_states"], ["model.layers.*"], ["hidden_states.2", "model.layers.1.mlp"]])
def test_each_reader_ignores_the_others_forward(layers: list[str]) -> None:
    target = adapted().eval()
    config = linear(target_layers=layers, guide_layers=layers, log_measures=[])
    guidance = GuidanceLoss(target, load_guide_of_base(target), config)
    batch, seen = token_batch(), {"target": [], "guide": []}
    readers = {"target": guidance.target_reader, "guide": guidance.guide_reader}
    for role, reader in readers.items():
        store = reader._store
        reader._store = lambda name, output, role=role, store=store: (  # type: ignore[method-assign]
            seen[role].append((name, reader_is_reading(readers[role]), first(output))),
            store(name, output),
        )
    with guidance.watch(batch) as watched:
        target(**watched.inputs)
    with torch.no_grad(), target.disable_adapter():
        without = hidden(target, layers, batch)
    with torch.no_grad():
        with_adapters = hidden(target, layers, batch)
    for role, expected in (("target", with_adapters), ("guide", without)):
        read = {name: value for name, is_reading, value in seen[role] if is_reading}
        assert len([name for name, is_reading, _ in seen[role] if is_reading]) == len(read), "each once"
        assert read.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(read[name], value)
    name = next(iter(without))
    assert not torch.allclose(without[name], with_adapters[name])


def reader_is_reading(reader: Any) -> bool:
    return reader._reduce is not None


def first(output: Any) -> Tensor:
    return (output if torch.is_tensor(output) else output[0]).detach().clone()


def hidden(target: Any, layers: list[str], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the layers in a forward of its own, without this package."""
    network, found, handles = target.get_base_model(), {}, []
    for name, module in network.named_modules():
        if name in layers or ("model.layers.*" in layers and name.rpartition(".")[0] == "model.layers"):
            keep = lambda m, a, output, name=name: found.update({name: first(output)})  # noqa: E731
            handles.append(module.register_forward_hook(keep))
    states = target(**batch, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for i, state in enumerate(states):
        if f"hidden_states.{i}" in layers or (i and "hidden_states" in layers):
            found[f"hidden_states.{i}"] = state
    return found


def test_a_forward_that_raises_leaves_the_target_as_it_was() -> None:
    target = frozen_adapter()
    target.base_model.model.model.layers[1].eval()  # modes that differ from module to module
    guide, before = load_guide_of_base(target), state_of(target)
    handle = target.get_base_model().model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        guide(**token_batch())
    handle.remove()
    assert_same(before, state_of(target))


def test_adapters_that_are_off_in_some_layers_stay_so() -> None:
    target = adapted()
    next(iter(adapters_in(target).values()))[0].enable_adapters(False)
    before = state_of(target)
    load_guide_of_base(target)(**token_batch())
    assert_same(before, state_of(target))
    assert set(before["off"].values()) == {True, False}


def test_freezing_the_guide_does_not_reach_the_target() -> None:
    target = adapted().train()
    before, guide = state_of(target), load_guide_of_base(target)
    assert freeze(guide, device=torch.device("meta")) is guide
    assert load_guide(guide) is guide
    guide.to(torch.float64).train().requires_grad_(True).eval()
    assert_same(before, state_of(target))
    assert not [*guide.parameters(), *guide.buffers(), *guide.children()]


def test_dropout_is_off_in_the_guide_and_no_randomness_is_used() -> None:
    target = adapted().train()
    guide, batch = load_guide_of_base(target), token_batch()
    state = torch.random.get_rng_state()
    with torch.no_grad():
        torch.testing.assert_close(guide(**batch).logits, base().eval()(**batch).logits, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(target(**batch).logits, target(**batch).logits)


def test_bfloat16_autocast_gives_the_adapters_their_gradients() -> None:
    def gradients(guide_of: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
        target = adapted()
        with torch.autocast("cpu", torch.bfloat16):
            return gradients_by(target, guide_of(target), linear())[1]

    own, other = gradients(load_guide_of_base), gradients(lambda target: base())
    torch.testing.assert_close(own, other)
    assert all(slope.abs().max() > 0 for slope in own.values())


def test_activation_checkpointing_changes_nothing() -> None:
    def gradients(checkpointed: bool) -> tuple[Tensor, dict[str, Tensor]]:
        target = adapted().train()
        if checkpointed:
            target.enable_input_require_grads()
            target.gradient_checkpointing_enable({"use_reentrant": False})
        return gradients_by(target, load_guide_of_base(target), linear(target_layers=["model.layers.*"]))

    torch.testing.assert_close(gradients(True), gradients(False))


# ------------------------------------------------------------------------------------------------------------ sharing


def test_a_guide_that_shares_weights_by_accident_is_still_refused() -> None:
    target = adapted()
    check_apart(target, load_guide_of_base(target))
    with pytest.raises(
        ValueError, match=r"the guide shares \d+ parameters with the target.*pass guide='base', or load_gu"
    ):
        check_apart(target, target.get_base_model())
    around_the_same_base = peft.PeftModel(target.get_base_model(), lora(), "other")
    for guide in (load_guide_of_base(around_the_same_base), around_the_same_base):
        with pytest.raises(ValueError, match=r"the guide shares \d+ parameters with the target"):
            check_apart(target, guide)
    check_apart(adapted(), load_guide_of_base(target))  # the base of another target is a network of its own
    with pytest.raises(ValueError, match=r"copy\.deepcopy\) or another network\.$"):
        check_apart(network := gpt2(), network)


def norm_net() -> nn.Module:
    return peft.get_peft_model(NormNet(), peft.LoraConfig(target_modules=["out"], r=2))


def merged() -> nn.Module:
    target = adapted()
    target.merge_adapter()
    return target


def of_an_unknown_kind() -> nn.Module:
    target = adapted()
    layer = target.get_base_model().model.layers[0].self_attn.q_proj
    layer.inside = layer.base_layer
    del layer.base_layer
    return target


def with_a_trained_base() -> nn.Module:
    target = adapted()
    target.get_base_model().model.embed_tokens.requires_grad_(True)
    return target


BIASED = lora(target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no adapters": (
        gpt2,
        r"the target \(GPT2LMHeadModel\) has no layers with adapters: add some with peft.get_peft_mod",
    ),
    "prompts": (
        lambda: peft.get_peft_model(base(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        r"the target \(PeftModelForCausalLM\) has no layers with adapters",
    ),
    "merged": (merged, r"adapters are merged into its base.*call unmerge_adapter\(\)"),
    "a trained base": (
        with_a_trained_base,
        r"1 of its weights are trained \(model\.embed_tokens\.weight\): train adapters",
    ),
    "biases": (
        lambda: peft.get_peft_model(gpt2(), BIASED),
        r"13 of its weights are trained \(transformer\.h\.0\.ln_1\.bias, .* and 10 more\).*bias='none'",
    ),
    "PiSSA": (
        lambda: adapted(lora(init_lora_weights="pissa")),
        r"adapter 'default' has init_lora_weights='pissa', which changes the weights of the base.*copy of the base",
    ),
    "parts of an unknown kind": (
        of_an_unknown_kind,
        "cannot tell base and adapters apart in Linear: use another kind of adapter",
    ),
    "batch norm": (norm_net, "the running statistics of its 1 batch norm layers move in training"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_base_that_is_missing_or_would_not_stay_is_an_error(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        load_guide_of_base(make())


@pytest.mark.parametrize(
    "setting", [{"shard_guide": True}, {"save_guide": True}, {"guide_batch_norm": "batch"}], ids=lambda s: next(iter(s))
)
def test_a_setting_for_a_guide_with_weights_of_its_own_is_an_error(setting: dict[str, Any]) -> None:
    target, (name, value) = adapted(), *setting.items()
    with pytest.raises(ValueError, match=rf"^{name}={value!r} needs a guide with weights of its own.*load_guide"):
        GuidanceLoss(target, load_guide_of_base(target), linear(**setting))


def test_the_word_base_is_for_a_trainer() -> None:
    with pytest.raises(ValueError, match=r"guide is 'base', which a trainer alone takes: pass load_guide_of_base"):
        GuidanceLoss(adapted(), "base")  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("kind", KINDS)
def test_its_fingerprint_is_that_of_the_base_alone_whatever_the_adapters_hold(kind: str) -> None:
    target = KINDS[kind]()
    guide = load_guide_of_base(target)
    assert fingerprint(guide) == fingerprint(base())
    with torch.no_grad():
        for weight in target.parameters():
            if weight.requires_grad:
                weight += 1
    assert fingerprint(guide) == fingerprint(base())
    assert guide.weights().keys() == base().state_dict().keys()
    next(iter(guide.shared().values())).data += 1
    assert fingerprint(guide) != fingerprint(base())


def test_its_identity_says_what_it_is_and_where_it_comes_from(tmp_path: Path) -> None:
    found, alone = identity(load_guide_of_base(adapted())), identity(base())
    assert found == alone | {"own_base": True}
    assert (found["architecture"], found["source"]) == ("LlamaForCausalLM", None)
    base().save_pretrained(tmp_path / "my-base")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "my-base")
    target = peft.get_peft_model(loaded, lora())
    assert identity(load_guide_of_base(target))["source"] == "my-base"
    target.get_base_model().config._name_or_path = "me/base"
    target.get_base_model().config._commit_hash = "abc"
    found = identity(load_guide_of_base(target))
    assert (found["source"], found["revision"], found["fingerprint"]) == ("me/base", "abc", alone["fingerprint"])


def test_a_target_with_it_can_be_copied() -> None:
    target = adapted()
    guidance = GuidanceLoss(target, load_guide_of_base(target), linear())
    other = copy.deepcopy(target)
    assert isinstance(guidance.guide, OwnBase)
    check_apart(other, guidance.guide)
    other(**token_batch())


def test_what_has_no_base_is_no_target() -> None:
    with pytest.raises(ValueError, match=r"target is a NoneType; expected a network, which is an nn\.Module"):
        load_guide_of_base(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"target \(Linear\) has no layers with adapters: add some with peft"):
        load_guide_of_base(nn.Linear(2, 2))
