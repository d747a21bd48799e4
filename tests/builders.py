"""Tiny networks, data and trainers that the tests share, and the paper's similarity written out in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    MambaModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from hf_guidance import GuidanceConfig

VOCABULARY, LENGTH = 17, 6


def seeded(make: Any, seed: int) -> Any:
    """Call `make` under a seed, and leave the caller's random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def gpt2(seed: int = 0, layers: int = 2, dropout: float = 0.0, vocabulary: int = VOCABULARY) -> GPT2LMHeadModel:
    """A language model whose forward accepts loss kwargs."""
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    sizes = {"n_positions": 32, "n_embd": 8, "n_layer": layers, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=vocabulary, **sizes, **drop)
    network = seeded(lambda: GPT2LMHeadModel(config), seed)
    network.loss_type = "ForCausalLM"  # its class name does not say so, and Trainer would count an item too many a row
    return network


def llama_config(layers: int = 3, vocabulary: int = VOCABULARY) -> LlamaConfig:
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    return LlamaConfig(vocab_size=vocabulary, **sizes)


def llama(seed: int = 1, layers: int = 3, vocabulary: int = VOCABULARY) -> LlamaModel:
    """A guide, in train mode and with gradients as any fresh network."""
    return seeded(lambda: LlamaModel(llama_config(layers, vocabulary)), seed)


def t5(seed: int = 0, layers: int = 2) -> T5ForConditionalGeneration:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": layers, "num_heads": 2}
    config = T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    return seeded(lambda: T5ForConditionalGeneration(config), seed)


class PlainNet(nn.Module):
    """A target that is no PreTrainedModel and accepts no loss kwargs; returns the tuple (loss, logits)."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = seeded(
            lambda: nn.Sequential(
                nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, VOCABULARY)
            ),
            seed,
        )

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.body(input_ids)
        if labels is None:
            return (logits,)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class NormNet(nn.Module):
    """A guide with batch norm."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.embed = seeded(lambda: nn.Embedding(VOCABULARY, 8), seed)
        self.norm = nn.BatchNorm1d(LENGTH)
        self.out = seeded(lambda: nn.Linear(8, 8), seed + 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.norm(self.embed(input_ids)).relu())


class MustNotRun(nn.Module):
    """A guide whose forward raises."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        raise AssertionError("the guide ran")


# ------------------------------------------------------------------------------------------------------------- data


def token_batch(rows: int = 8, length: int = LENGTH, seed: int = 0) -> dict[str, Tensor]:
    """Random token ids, the labels the same."""
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def token_rows(rows: int = 24, length: int = LENGTH, seed: int = 0) -> list[dict[str, Tensor]]:
    """The same as a dataset."""
    batch = token_batch(rows, length, seed)
    return [{name: value[i] for name, value in batch.items()} for i in range(rows)]


def linear(**settings: Any) -> GuidanceConfig:
    """Settings that train on linear CKA, the similarity written out below, unless they name another measure."""
    return GuidanceConfig(**{"measure": "linear_cka", **settings})


def arguments(folder: Path | str, **changes: Any) -> TrainingArguments:
    """Three optimizer steps of four rows each, every one logged, nothing saved."""
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    return TrainingArguments(str(folder), **{**defaults, **changes})


# ------------------------------------------------------------------------------------------------------- references

EVEN = [(0, 0), (1, 1), (1, 2)]  # ⌊i (2 − 1) / (3 − 1) + ½⌋ for the three layers of `llama` over the two of `gpt2`


def hidden_states(network: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Hidden states but the embeddings, a decoder's if there are two stacks, asked for in a forward of its own."""
    outputs = network(**batch, output_hidden_states=True)
    states = outputs.hidden_states if "hidden_states" in outputs else outputs.decoder_hidden_states
    if isinstance(network, MambaModel):
        return list(states[:-1])  # without embeddings, and with the last layer twice
    return list(states[1:])


def module_outputs(network: nn.Module, names: list[str], *args: Any, **kwargs: Any) -> list[Tensor]:
    """Return the outputs of the named modules in a forward of its own."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen.update({name: output if torch.is_tensor(output) else output[0]})

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    network(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return [seen[name] for name in names]


def guidance_by_hand(target: nn.Module, guide: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Σ over `EVEN` of (1 − CKA) of the hidden states of a two-layer target and a three-layer guide."""
    with torch.no_grad():
        theirs = hidden_states(guide, {"input_ids": batch["input_ids"]})
    ours = hidden_states(target, {"input_ids": batch["input_ids"]})
    return sum((1 - cka(ours[t], theirs[g]) for t, g in EVEN), torch.tensor(0.0, dtype=torch.float64))


def cka(target: Tensor, guide: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute `⟨K, L⟩ / (‖K‖ ‖L‖)` in float64; `mask`, `(rows, length)`, is for right-padded rows of both."""
    k, l = _kernel(target, mask), _kernel(guide, mask)  # noqa: E741
    return (k * l).sum() / (k.norm() * l.norm())


def _kernel(features: Tensor, mask: Tensor | None) -> Tensor:
    """Centred linear kernel; with a mask the sum over positions of the kernels of the rows that have one there."""
    x = features.double()
    if mask is None:
        x = (x - x.mean(0)).flatten(1)
        return x @ x.T
    kernel = x.new_zeros(len(x), len(x))
    for position, valid in enumerate(mask.T):
        rows = valid.nonzero().flatten()
        if (m := len(rows)) >= 2:
            here = x[rows, position] - x[rows, position].mean(0)
            kernel[rows[:, None], rows] += here @ here.T + here.square().sum() / (m * (m - 1))
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


def gradients(network: nn.Module, loss: Tensor) -> list[Tensor]:
    """Gradients of a loss in all parameters, zero where it does not depend on one."""
    parameters = list(network.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
