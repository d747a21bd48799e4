"""Small networks of every architecture of transformers, timm and torchvision, with a batch that each runs on."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from small_batches import batches_for, random_values, token_ids
from small_configs import LENGTH, ROWS, SAMPLES, VOCABULARY, WIDTH, class_of_network, small_config, transformers_names
from torch import Tensor, nn


@dataclass
class Case:
    """A network with a batch for it.

    Attributes:
        network: The network.
        batch: Columns of its forward.
        kind: `text`, `image`, `audio` or another kind of input.
        layers: Layers to compare.
        settings: Settings of guidance that are not the defaults.
        blocks: Names of its blocks: the largest stack of modules that each run once and return the batch.
    """

    network: nn.Module
    batch: dict[str, Any]
    kind: str
    layers: tuple[str, ...] = ("hidden_states",)
    blocks: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def by_blocks(self) -> Case:
        """Return the same with its blocks as layers."""
        return replace(self, layers=self.blocks)


def transformers_case(name: str) -> Case:
    """Build a small network of transformers, and find a batch that it runs on."""
    cls, config_class = class_of_network(name)
    torch.manual_seed(0)
    config = small_config(config_class)
    if not isinstance(config, cls.config_class):  # the language model inside
        config = next(part for part in vars(config).values() if isinstance(part, cls.config_class))
    network = cls(config)
    network.float()
    return case_of(network, "+" in name)


def case_of(network: Any, with_head: bool, batches: Iterable[dict[str, Any]] | None = None) -> Case:
    """Find a batch that a network runs forward and backward on, among those that its forward's arguments suggest."""
    first: Exception | None = None
    for batch in batches_for(network, with_head) if batches is None else batches:
        try:
            network.train()
            network.zero_grad()
            loss_of(network(**batch)).backward()
            network.zero_grad()
        except Exception as error:  # networks raise anything on what they do not take
            first = first or error
            continue
        return Case(network, batch, _kind(batch), blocks=tuple(blocks_of(network, batch)))
    assert first is not None
    raise first


def blocks_of(network: nn.Module, batch: dict[str, Any]) -> list[str]:
    """Return the names of the blocks of a network: the largest list of modules that each run once on the batch."""
    runs: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = next(tensors_in(output), None)
            shapes[name] = (0, 0) if value is None or value.ndim < 2 else value.shape
            runs[name] += 1 if shapes[name][0] == ROWS else 100

        return hook

    stacks: dict[str, list[str]] = {}
    for name, module in network.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            stacks[name] = [f"{name}.{i}" for i, _ in module.named_children()]
    handles = [network.get_submodule(n).register_forward_hook(count(n)) for stack in stacks.values() for n in stack]
    with torch.no_grad():
        network(**batch)
    for handle in handles:
        handle.remove()
    once = [stack for stack in stacks.values() if all(runs[name] == 1 for name in stack)]
    positions = batch["input_ids"].shape[1] if "attention_mask" in batch and "input_ids" in batch else None

    def rank(stack: list[str]) -> tuple[bool, bool, int]:
        fits = positions is None or shapes[stack[0]][1] == positions
        return (
            fits,
            len(shapes[stack[0]]) > 2,
            sum(p.numel() for n in stack for p in network.get_submodule(n).parameters()),
        )

    return max(once, key=rank, default=[])


def loss_of(output: Any) -> Tensor:
    """Return the loss of a network's output, else the mean square of its floating-point tensors."""
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad:
        return loss.mean()
    parts = [t.float().square().mean() for t in tensors_in(output) if t.is_floating_point() and t.requires_grad]
    if not parts:
        raise ValueError("no output carries a gradient")
    return torch.stack(parts).sum()


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yield all tensors of an output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_in(value)


def _kind(batch: dict[str, Any]) -> str:
    if "input_ids" in batch:
        return "text"
    if "pixel_values" in batch and batch["pixel_values"].ndim == 4:
        return "image"
    return "audio" if {"input_values", "input_features"} & batch.keys() else "other"


# -------------------------------------------------------------------------------------------- families and partners


def case_named(name: str) -> Case:
    """Build a network by its name: `bert`, `bert+MASKED_LM`, `timm/resnet18`, `torchvision/swin_t`."""
    family, _, rest = name.partition("/")
    return FAMILIES[family][1](rest) if rest and family in FAMILIES else transformers_case(name)


# some of their sizes are in no config, so that they take minutes or all memory
LARGE = ("evolla", "evolla+IMAGE_TEXT_TO_TEXT", "EvollaModel", "perceiver+MASKED_LM", "fast_vlm+IMAGE_TEXT_TO_TEXT")


def names_of(family: str) -> list[str]:
    """Return the names of a family's networks."""
    names = [name for name in FAMILIES[family][0]() if name not in LARGE]
    return names if family == "transformers" else [f"{family}/{name}" for name in names]


TIMM = """
    beit_base_patch16_224 eca_botnext26ts_256 test_byobnet cait_xxs24_224 coat_tiny convit_tiny
    test_convnext cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny
    deit_tiny_patch16_224 densenet121 dla60x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0
    test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0
    fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224
    sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4
    lcnetv2_small levit_128 lowformer_b0 test_mambaout test_coatnet poolformer_s12 gmlp_ti16_224
    mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_siglip nasnetalarge
    nest_tiny nextvit_small test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_004_tv
    repghostnet_050 repvit_m1 res2net50_14w_8s resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42
    legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
    swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small
    vgg11 visformer_tiny test_vit vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224 vitamin_small_224
    volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224
"""  # one small network of each of timm's modules
TORCHVISION = """
    alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 mnasnet0_5 mobilenet_v2
    mobilenet_v3_small regnet_x_400mf resnet18 shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11 vit_b_32 r3d_18
    swin3d_t
"""


def timm_case(name: str) -> Case:
    """Build a network of timm through transformers' wrapper, for images as small as it takes."""
    import timm
    from transformers import AutoModelForImageClassification, TimmWrapperConfig

    settings: Any = timm.get_pretrained_cfg(name)
    own = settings.input_size[-1]
    first: Exception | None = None
    for size in (64, 96, 128, own):
        for given in ({}, {"img_size": size}):
            torch.manual_seed(0)
            try:
                options: dict[str, Any] = {"architecture": name, "model_args": given, "num_labels": 2}
                config = TimmWrapperConfig(**options)
                network = AutoModelForImageClassification.from_config(config)
                batch = {"pixel_values": random_values(ROWS, 3, size, size), "labels": torch.arange(ROWS) % 2}
                network.eval()
                with torch.no_grad():
                    network(**batch)
                return case_of(network, True, [batch])
            except Exception as error:  # networks raise anything on sizes that they do not take
                first = first or error
    assert first is not None
    raise first


class Vision(nn.Module):
    """A network of torchvision with a loss, as a trainer needs it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        output = self.network(pixel_values)
        logits = output if isinstance(output, Tensor) else output[0]
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def torchvision_case(name: str) -> Case:
    """Build a network of torchvision, with its blocks as layers and positions as samples."""
    import torchvision

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vit_b_32": {"image_size": 64}}
    network = Vision(torchvision.models.get_model(name, weights=None, num_classes=2, **sizes.get(name, {})))
    size = 192 if name == "inception_v3" else 64
    images = [random_values(ROWS, 3, size, size), random_values(ROWS, 3, 8, 32, 32)]
    case = case_of(network, True, [{"pixel_values": image, "labels": torch.arange(ROWS) % 2} for image in images])
    children = network.network.named_children()
    stages = [name for name, child in children if isinstance(child, nn.Sequential) and name != "classifier"]
    layers = tuple(f"network.{name}" for name in stages) if len(stages) > 3 else case.blocks
    return replace(case, layers=layers, settings={"sample_axis": "token"})


class Torch(nn.Module):
    """A small network of torch's own layers over tokens, with a mask of padding."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(self._layer() for _ in range(3))
        self.whole = nn.TransformerEncoder(self._layer(), 3) if kind in ("whole", "nested") else None
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def _layer(self) -> Any:
        if self.kind == "attention":
            return nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        if self.kind in ("lstm", "gru", "rnn"):
            return getattr(nn, self.kind.upper())(WIDTH, WIDTH, batch_first=True)
        if self.kind == "decoder":
            return nn.TransformerDecoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True)
        first = self.kind != "length_first"  # torch packs padded rows into nested tensors only where norms come last
        last = self.kind != "nested"
        return nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=first, norm_first=last)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x, padding = self.embed(input_ids), attention_mask == 0
        if self.whole is not None:
            x = self.whole(x, src_key_padding_mask=padding)
        for layer in self.layers if self.whole is None else ():
            if self.kind == "attention":
                x = x + layer(x, x, x, key_padding_mask=padding)[0]
            elif self.kind in ("lstm", "gru", "rnn"):
                x = layer(x)[0]
            elif self.kind == "decoder":
                x = layer(x, x, tgt_key_padding_mask=padding, memory_key_padding_mask=padding)
            elif self.kind == "length_first":
                x = layer(x.transpose(0, 1), src_key_padding_mask=padding).transpose(0, 1)
            else:
                x = layer(x, src_key_padding_mask=padding)
        logits = self.head(x)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}
        return {**loss, "logits": logits}


def torch_case(kind: str) -> Case:
    """Build a network of torch's own layers."""
    torch.manual_seed(0)
    batch = {
        "input_ids": token_ids(),
        "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long),
        "labels": token_ids(),
    }
    layers = ("whole.layers.*",) if kind in ("whole", "nested") else ("layers.*",)
    return replace(case_of(Torch(kind), True, [batch]), layers=layers)


FAMILIES: dict[str, tuple[Callable[[], list[str]], Callable[[str], Case]]] = {
    "transformers": (transformers_names, transformers_case),
    "timm": (TIMM.split, timm_case),
    "torchvision": (TORCHVISION.split, torchvision_case),
    "torch": ("encoder whole nested decoder attention length_first lstm gru rnn".split, torch_case),
}


def partner_for(case: Case) -> Case:
    """Build a simple network of the same kind of input, with a batch of its own."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        ResNetConfig,
        ResNetForImageClassification,
        Wav2Vec2Config,
        Wav2Vec2Model,
    )

    torch.manual_seed(1)
    if case.settings:  # of the same architecture, so that positions match
        network = copy.deepcopy(case.network)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.05)
        return replace(case, network=network)
    if case.kind == "image" and case.batch["pixel_values"].shape[1] == 3:
        sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16, 16], "depths": [1, 1, 1]}
        images = {"pixel_values": case.batch["pixel_values"], "labels": torch.arange(ROWS) % 2}
        return Case(ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic")), images, "image")
    if case.kind == "audio":
        network = Wav2Vec2Model(small_config(Wav2Vec2Config))
        return Case(network, {"input_values": random_values(ROWS, SAMPLES)}, "audio")
    ids = case.batch.get("input_ids", token_ids())
    ids = ids if ids.ndim == 2 else token_ids()
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    text["attention_mask"] = case.batch.get("attention_mask", text["attention_mask"])
    network = GPT2LMHeadModel(small_config(GPT2Config, {"vocab_size": _vocabulary(case), "n_positions": 128}))
    network.loss_type = "ForCausalLM"
    return Case(network, text, "text")


def _vocabulary(case: Case) -> int:
    config: Any = getattr(case.network, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", VOCABULARY) if "input_ids" in case.batch else VOCABULARY
