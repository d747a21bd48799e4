"""Small networks of every architecture of transformers, timm and torchvision, with a batch that each runs on."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH, VOCABULARY, WIDTH, IMAGE, SAMPLES, FRAMES, MELS = 6, 7, 99, 32, 32, 1600, 32, 16

# the first pattern that matches a field's name gives its largest value; lists are cut or scaled by `_small_list`
SIZES: dict[str, int] = {
    r"(|.*_)vocab_size(_per_layer_input)?": VOCABULARY,
    r"(|.*_)(num_)?key_value_heads": 2,
    r".*head_dim|d_kv|d_head|kv_channels|dim_head|.*_d_head|rotary_dim|head_size": 8,
    r"num_kv_shared_layers": 0,
    r"first_k_dense_replace|num_dense_layers": 1,
    r"(|.*_)(n_?|num_)?(hidden_|encoder_|decoder_|attention_)?(layers?|blocks)|depth|.*_depth": 3,
    r".*heads?|.*n_heads": 4,
    r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|n_inner|mlp_dim|feedforward_dim|d_inner)": 64,
    r".*(q|kv)_lora_rank": 16,
    r".*(hidden_size|d_model|n_embd|embedding_size|_width)": WIDTH,
    r"(?!.*(label|token)).*_dim|.*_size_per_layer_input|hidden|width": WIDTH,
    r".*(projection|pooler_output|out_hidden|feature)_size": WIDTH,
    r"(|.*_)(max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length)": 64,
    r".*image_size|input_size|pretrain_image_size|.*resolution|crop_size": IMAGE,
    r"patch_size|.*_patch_size": 8,
    r"output_channels|mask_decoder_hidden_size": WIDTH,
    r".*num_mel_bins|.*n_mels": MELS,
    r"max_source_positions": FRAMES // 2,
    r"index_topk": 16,
    r".*num_experts_per_tok(en)?|.*moe_k|.*topk|moe_topk|top_k_experts": 2,
    r".*(experts|num_expert)": 4,
    r"n_group|topk_group|num_expert_group": 1,
    r"num_queries|num_query_tokens": 10,
    r".*sliding_window(_size)?|local_attention": 6,
    r".*codebook_size|num_embeddings": 64,
}
WIDTHS = re.compile(r".*(hidden_sizes|embed_dims?|channels|dims|conv_dim|tdnn_dim|output_channels|in_channels|width)")
DEPTHS = re.compile(r"depths|layer_depths|.*num_block_repeats|num_blocks|.*depths?|.*stage_num_blocks")
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}
SWIN = {"window_size": 4, "patch_size": 4, "depths": [1, 2], "num_heads": [2, 4], "embed_dim": 16}
UNSET: dict[str, Any] = {  # values for fields that are None by default, but needed
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "head_dim": WIDTH // 4,
    "num_key_value_heads": 4,
    "image_token_index": VOCABULARY - 1,
}
WHOLE = re.compile(
    "hgnet|d_fine|deimv2|pp_(doclayout|ocr)|pvt$|edgetam|efficientnet|poolformer|rt_detr|sam2|hiera"
)  # lists
OVERRIDES: dict[str, dict[str, Any]] = {
    "align_vision_model": {"hidden_dim": WIDTH, "width_coefficient": 0.25, "depth_coefficient": 0.5},
    "audio-spectrogram-transformer": {"max_length": FRAMES, "frequency_stride": 8, "time_stride": 8},
    "autoformer": {**SERIES, "moving_average": 3},
    "align": {"projection_dim": 80},
    "decision_transformer": {"hidden_size": WIDTH, "n_head": 4, "state_dim": 5, "act_dim": 3},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "depth_pro": {"patch_size": 32},
    "clvp_encoder": {"hidden_size": 64, "num_attention_heads": 2, "projection_dim": 64},
    "clvp_decoder": {"hidden_size": 64, "n_embd": 64, "num_attention_heads": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6, "max_2d_position_embeddings": 64},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "longformer": {"attention_window": 4},
    "led": {"attention_window": 4},
    "llama4": {"pad_token_id": 0},
    "mimi": {"upsample_groups": 32},
    "dots3_note": {"per_layer_config": None},
    "dots3_note_vision_encoder": {"per_layer_config": None},
    "efficientnet": {"hidden_dim": 320, "width_coefficient": 0.25, "depth_coefficient": 0.25},
    "emu3": {"vocabulary_map": {"<image>": 98}, "pad_token_id": 0},
    "ernie4_5_vl_moe_text": {"head_dim": 16, "rope_parameters": {**MROPE, "mrope_section": [3, 3, 2]}},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 32, "pad_token_id": 1},
    "deepseek_v2": {"topk_method": "greedy"},
    "bit": {"num_groups": 4, "depths": [1, 1], "hidden_sizes": [16, 32]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "bridgetower_vision_model": {"hidden_size": 64},
    "bros": {"dim_bbox_sinusoid_emb_2d": 32, "dim_bbox_sinusoid_emb_1d": 4, "dim_bbox_projection": 8},
    "chameleon": {"vocabulary_map": {"<image>": 98}},
    "clap_audio_model": {
        "hidden_size": 64,
        "spec_size": 64,
        "window_size": 4,
        "num_mel_bins": 16,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
    },
    "glm4v_moe_text": {"rope_parameters": MROPE, "head_dim": 16},
    "glpn": {"decoder_hidden_size": 128, "hidden_sizes": [16, 32, 80, 128]},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    **dict.fromkeys(("swin", "swinv2", "donut-swin"), SWIN),
    "mobilevit": {"hidden_sizes": [32, 32, 64], "neck_hidden_sizes": [16, 16, 16, 32, 32, 64, 64]},
    "patchtst": {"context_length": 8, "patch_length": 4},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp"]},
    "reformer": {"axial_pos_embds": False, "is_decoder": True, "num_buckets": 4},
    "granite_speech5_encoder": {"context_size": 32},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "cvt": {"depth": [1, 2, 3], "embed_dim": [16, 32, 32], "num_heads": [1, 2, 2]},
    "lw_detr_vit": {"image_size": 64, "num_windows": 4},
    "poolformer": {"hidden_sizes": [16, 32, 64, 64]},
    "pvt": {"image_size": 64},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "gemma3": {"mm_tokens_per_image": 4},
    "informer": SERIES,
    "time_series_transformer": SERIES,
}


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


# ----------------------------------------------------------------------------------------------------------- configs


def small_config(cls: Any, given: dict[str, Any] | None = None) -> Any:
    """Make a small config of a class of transformers: each size at its largest value of the table, parts likewise."""
    given = {**OVERRIDES.get(cls.model_type, {}), **(given or {})}
    parts = cls.sub_configs_defaults
    values: dict[str, Any] = {}
    defaults = {
        f.name: f.default
        if f.default is not MISSING
        else f.default_factory()
        if f.default_factory is not MISSING
        else None
        for f in fields(cls)
    }
    heads = next((defaults[n] for n in ("num_attention_heads", "n_head", "num_heads") if defaults.get(n)), None)
    for name, value in defaults.items():
        if name in parts:
            continue
        small = _small(name, value, bool(WHOLE.match(cls.model_type)))
        if "key_value_heads" in name and isinstance(value, int) and value == heads:
            small = min(4, value)
        if small != value:
            values[name] = small
    for name, spec in parts.items():
        if spec.optional and name not in given and not spec.init_kwargs and defaults.get(name) is None:
            continue
        inner = given.pop(name, {})
        if inner is None:
            values[name] = None
            continue
        model_type = inner.pop("model_type", None) if isinstance(inner, dict) else None
        sub = _config_class(model_type) if model_type else _class_of(spec)
        if isinstance(inner, dict) and "timm" not in sub.model_type:
            inner = dict(inner)
            start = {} if model_type else {n: _small(n, v) for n, v in spec.init_kwargs.items()}
            values[name] = small_config(sub, {**start, **inner})
    if "rope_parameters" in defaults and "vocab_size" in defaults and _has_mrope(cls):
        values["rope_parameters"] = MROPE
    values |= given
    if values.get("out_indices") and "num_hidden_layers" in defaults:
        count = len(values["out_indices"])
        values |= {"out_indices": list(range(1, count + 1)), "num_hidden_layers": max(count, 3)}
        values.pop("out_features", None)
    return cls(**values)


def _has_mrope(cls: Any) -> bool:
    """Tell whether a config's rotary positions are of several axes, of which the default sizes are too large."""
    if re.match("cohere_compass|neomme", cls.model_type):
        return False
    module = cls.__module__.replace(".configuration_", ".modeling_")
    found = importlib.util.find_spec(module)
    return bool(found and found.origin and "mrope_section" in Path(found.origin).read_text(encoding="utf-8"))


def _class_of(spec: Any) -> Any:
    from transformers import PreTrainedConfig

    own = isinstance(spec.config_class, type) and issubclass(spec.config_class, PreTrainedConfig)
    return spec.config_class if own else _config_class(spec.model_type)


def _config_class(model_type: str) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def _small(name: str, value: Any, whole: bool = False) -> Any:
    """Return a field's value in a small network."""
    if name == "use_cache":
        return False  # as Trainer sets it
    if value is None and name in UNSET:
        return UNSET[name]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float) and re.search("drop|mask_(time|feature)_prob|jitter", name):
        return 0.0
    if isinstance(value, int) and re.fullmatch(r".*(token_id|token_index|_index|token_idx)", name):
        return value if abs(value) < 4 else 60 + sum(map(ord, name)) % 38
    if isinstance(value, int):
        return next((min(value, most) for pattern, most in SIZES.items() if re.fullmatch(pattern, name)), value)
    if isinstance(value, dict) and "mrope_section" in value:
        return {**value, "mrope_section": [2, 1, 1]}
    if isinstance(value, (list, tuple)) and value and all(type(entry) is int for entry in value):
        return _small_list(name, value, whole)
    return value


def _small_list(name: str, value: Any, whole: bool) -> Any:
    kind = type(value)
    if DEPTHS.fullmatch(name):
        return kind(min(entry, 2 if i == 1 else 1) for i, entry in enumerate(value))
    if name == "decoder_in_channels":
        return kind(WIDTH for _ in value)
    if WIDTHS.fullmatch(name) and not whole:
        scale = max(1, min(value) // 16)
        return kind(max(1, entry // scale) for entry in value)
    if re.fullmatch(r".*num_(attention_)?heads", name):
        return kind(min(entry, 2) for entry in value)
    if re.fullmatch(".*image_size", name):
        return kind(IMAGE for _ in value)
    return value


# ---------------------------------------------------------------------------------------------------------- networks

HEADS = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM",
    "IMAGE_CLASSIFICATION", "CTC", "AUDIO_CLASSIFICATION", "SEQUENCE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "VISUAL_QUESTION_ANSWERING", "SEMANTIC_SEGMENTATION", "OBJECT_DETECTION", "DEPTH_ESTIMATION",
    "TOKEN_CLASSIFICATION", "TIME_SERIES_PREDICTION", "MASK_GENERATION", "UNIVERSAL_SEGMENTATION", "ZERO_SHOT_OBJECT_DETECTION", "RNNT", "TDT",
    "IMAGE_TO_IMAGE", "KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "POSE_ESTIMATION", "TEXT_TO_SPECTROGRAM",
    "TEXT_TO_WAVEFORM", "PRETRAINING", "QUESTION_ANSWERING", "RETRIEVAL", "BACKBONE",
)  # fmt: skip


def transformers_names() -> list[str]:
    """Return model types of transformers, each alone (base model) and with its natural head, as `bert+MASKED_LM`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    names = []
    for model_type in CONFIG_MAPPING_NAMES:
        names.append(model_type)
        if (head := _head_of(model_type)) is not None:
            names.append(f"{model_type}+{head}")
    return names


def _head_of(model_type: str) -> str | None:
    from transformers.models.auto import modeling_auto as auto

    return next((h for h in HEADS if model_type in getattr(auto, f"MODEL_FOR_{h}_MAPPING_NAMES", {})), None)


def class_of_network(name: str) -> Any:
    """Return the class of a network of transformers, and its config's class."""
    from transformers.models.auto import modeling_auto as auto

    model_type, _, head = name.partition("+")
    config = _config_class(model_type)
    module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    table = getattr(auto, f"MODEL_FOR_{head}_MAPPING_NAMES") if head else auto.MODEL_MAPPING_NAMES
    classes = table.get(model_type)
    if classes is not None:
        import transformers

        name_of_class = classes[0] if isinstance(classes, (list, tuple)) else classes
        return getattr(transformers, name_of_class, None) or getattr(module, name_of_class), config
    own = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, nn.Module)]
    own = [c for c in own if getattr(c, "config_class", None) is config and "PreTrained" not in c.__name__]
    if not own:
        raise LookupError(f"no network of transformers is made from a {config.__name__}")
    return min(own, key=lambda c: (not c.__name__.endswith("Model"), len(c.__name__))), config


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


# ----------------------------------------------------------------------------------------------------------- batches


def case_of(network: Any, with_head: bool, batches: Iterable[dict[str, Any]] | None = None) -> Case:
    """Find a batch that a network runs forward and backward on, among those that its forward's arguments suggest."""
    first: Exception | None = None
    for batch in _batches(network, with_head) if batches is None else batches:
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
    lengths: dict[str, int | None] = {}

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = next(tensors_in(output), None)
            lengths[name] = None if value is None or value.ndim < 2 else value.shape[1]
            runs[name] += 1 if value is not None and value.ndim > 1 and len(value) == ROWS else 100

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

    def rank(stack: list[str]) -> tuple[bool, int]:
        fits = positions is None or lengths[stack[0]] == positions
        return fits, sum(p.numel() for n in stack for p in network.get_submodule(n).parameters())

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


def _random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) * 2 - 1


def _ids(length: int = LENGTH, most: int = 50, seed: int = 0) -> Tensor:
    return torch.randint(5, most, (ROWS, length), generator=torch.Generator().manual_seed(seed))


def _batches(network: Any, with_head: bool) -> Iterator[dict[str, Any]]:
    parameters = inspect.signature(network.forward).parameters
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    needed = [n for n, p in named.items() if p.default is p.empty]
    main = network.main_input_name
    config = network.config
    text = "input_ids" in named
    makers = _makers(config)
    wanted = dict.fromkeys([*needed, *([main] if main in named else [])])
    if main == "input_ids" or (text and "attention_mask" in named and "input_ids" in wanted):
        wanted |= dict.fromkeys(n for n in ("attention_mask",) if n in named)
    two = [n for n in ("pixel_values", "input_ids", "attention_mask", "input_features", "input_values") if n in named]
    two += [n for n in ("actions", "rewards", "returns_to_go", "timesteps", "visual_feats", "visual_pos") if n in named]
    decoder = [n for n in ("decoder_input_ids",) if n in named]
    choices: list[list[str]] = []
    masks = ["input_features_mask", "past_time_features", "past_observed_mask", "future_values", "future_time_features"]
    extra = [
        ["decoder_input_values"],
        ["input_ids", "attention_mask", "bbox"],
        masks,
        [*two, *masks],
        [*masks, *decoder],
    ]
    for more in ([], decoder, two, [*two, *decoder], *extra, ["attention_mask", "encoder_hidden_states"]):
        chosen = list(dict.fromkeys([*wanted, *(n for n in more if n in named)]))
        if chosen not in choices:
            choices.append(chosen)
    if with_head and "pixel_values" in named and "input_ids" in named:
        yield from _with_images(config, named, makers["pixel_values"])
    for labels in ([_labels(network)] if with_head and "labels" in named else []) + [None]:
        for chosen in choices:
            if any(n not in makers for n in chosen):
                continue
            shapes = max(len(makers[n]) for n in chosen) if chosen else 0
            for i in range(shapes):
                batch = {n: makers[n][min(i, len(makers[n]) - 1)]() for n in chosen}
                if labels is not None:
                    batch["labels"] = labels
                    if "decoder_input_ids" in batch:
                        continue  # made from labels
                yield batch
    unknown = [n for n in needed if n not in makers]
    if unknown:
        raise LookupError(f"no column for {unknown}")


def _with_images(config: Any, named: Collection[str], images: list[Callable[[], Tensor]]) -> Iterator[dict[str, Any]]:
    """Yield batches of texts in which each row has an image, at so many tokens as it may take."""
    names = ("image_token_id", "image_token_index")
    token = next((getattr(config, n) for n in names if isinstance(getattr(config, n, None), int)), None)
    if token is None:
        return
    for count in (16, 4, 1, 10, 17, 64, 2, 5):
        ids = torch.cat([torch.full((ROWS, count), token), _ids()], 1)
        mask = torch.ones_like(ids)
        text = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(ids == token, -100, ids)}
        if "mm_token_type_ids" in named:
            text["mm_token_type_ids"] = (ids == token).long()
        if "token_type_ids" in named:
            text["token_type_ids"] = (ids == token).long()
        if "image_grid_thw" in named:
            patches = {"pixel_values": _random(ROWS * 16, 3 * 2 * 8 * 8)}
            yield {**text, **patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * ROWS)}
            continue
        for i in (0, 4):
            yield {**text, "pixel_values": images[i]()}
        if "image_sizes" in named:
            sizes = torch.tensor([[IMAGE, IMAGE]] * ROWS)
            yield {**text, "image_sizes": sizes, "pixel_values": images[0]()}


def _labels(network: Any) -> Tensor:
    name = type(network).__name__
    if re.search("Classification", name) and not re.search("Token|Frame", name):
        return torch.arange(ROWS) % 2
    if "CTC" in name:
        return _ids(3)
    if "TokenClassification" in name:
        return _ids() % 2
    return _ids(seed=1) if getattr(network.config, "is_encoder_decoder", False) else _ids()


def _makers(config: Any) -> dict[str, list[Callable[[], Any]]]:
    def find(*names: str, default: Any) -> Any:
        parts = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]
        parts += [v for p in parts[1:] for v in vars(p).values() if hasattr(v, "to_dict")]
        found = (getattr(p, n, None) for p in parts for n in names)
        return next((v for v in found if v is not None), default)

    size = find("image_size", "input_size", default=IMAGE)
    height = size if isinstance(size, int) else size[-2] if isinstance(size, (list, tuple)) else IMAGE
    width = size if isinstance(size, int) else size[-1] if isinstance(size, (list, tuple)) else IMAGE
    channels = find("num_channels", "in_channels", default=3)
    channels = channels if isinstance(channels, int) else 3
    mels = find("num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", default=MELS)
    frames = 2 * find("max_source_positions", default=FRAMES // 2)
    video = find("num_frames", "tubelet_size", default=2)
    video = video if isinstance(video, int) else 2
    images = [
        lambda: _random(ROWS, channels, height, width),
        lambda: _random(ROWS, 3, 2 * IMAGE, 2 * IMAGE),
        lambda: _random(ROWS, 3, 4 * IMAGE, 4 * IMAGE),
        lambda: _random(ROWS, video, channels, height, width),
        lambda: _random(ROWS, 1, channels, height, width),
        lambda: _random(ROWS, 16, channels * 8 * 8),
    ]
    spoken = [
        lambda: _random(ROWS, mels, frames),
        lambda: _random(ROWS, frames, mels),
        lambda: _random(ROWS, 1, 4 * FRAMES, mels),
        lambda: _random(ROWS, 1, 2 * FRAMES, mels),
        lambda: _random(ROWS, 160, FRAMES),
        lambda: _random(ROWS, FRAMES, 160),
    ]
    series = find("context_length", default=8)
    longest = find("max_length", "max_time_bins", default=frames)
    waves = [
        lambda: _random(ROWS, SAMPLES),
        lambda: _random(ROWS, 1, SAMPLES),
        lambda: _random(ROWS, frames, mels),
        lambda: _random(ROWS, longest, mels),
    ]
    lags = max(find("lags_sequence", default=[0]))
    coming = find("prediction_length", default=4)
    return {
        "input_ids": [_ids],
        "attention_mask": [lambda: torch.ones(ROWS, LENGTH, dtype=torch.long)],
        "decoder_input_ids": [lambda: _ids(seed=1)],
        "decoder_input_values": [lambda: _random(ROWS, LENGTH, mels)],
        "qformer_input_ids": [_ids],
        "bbox": [lambda: torch.tensor([1, 2, 30, 40]).repeat(ROWS, LENGTH, 1)],
        "pixel_values": images,
        "images": images,
        "pixel_values_videos": images[3:],
        "input_features": spoken,
        "input_features_mask": [
            lambda: torch.ones(ROWS, frames, dtype=torch.long),
            lambda: torch.ones(ROWS, FRAMES, dtype=torch.long),
        ],
        "input_values": waves,
        "hidden_states": [lambda: _random(ROWS, LENGTH, WIDTH), lambda: _random(ROWS * 16, 3 * 2 * 8 * 8)],
        "inputs": [_ids],
        "inputs_embeds": [lambda: _random(ROWS, LENGTH, WIDTH)],
        "encoder_hidden_states": [lambda: _random(ROWS, LENGTH, WIDTH)],
        "query_embeds": [lambda: _random(ROWS, LENGTH, WIDTH)],
        "past_values": [
            lambda: _random(ROWS, series + lags),
            lambda: _random(ROWS, series, find("num_input_channels", default=1)),
        ],
        "past_time_features": [lambda: _random(ROWS, series + lags, 1)],
        "past_observed_mask": [lambda: torch.ones(ROWS, series + lags)],
        "future_values": [lambda: _random(ROWS, coming)],
        "future_time_features": [lambda: _random(ROWS, coming, 1)],
        "grid_thw": [lambda: torch.tensor([[1, 4, 4]] * ROWS)],
        "image_grid_thw": [lambda: torch.tensor([[1, 4, 4]] * ROWS)],
        "visual_feats": [lambda: _random(ROWS, 4, find("visual_feat_dim", default=WIDTH))],
        "visual_pos": [lambda: _random(ROWS, 4, 4)],
        "states": [lambda: _random(ROWS, LENGTH, 5)],
        "actions": [lambda: _random(ROWS, LENGTH, 3)],
        "rewards": [lambda: _random(ROWS, LENGTH, 1)],
        "returns_to_go": [lambda: _random(ROWS, LENGTH, 1)],
        "timesteps": [lambda: torch.arange(LENGTH).repeat(ROWS, 1)],
        "image": [lambda: _random(ROWS, 3, IMAGE, IMAGE)],
    }


# -------------------------------------------------------------------------------------------- families and partners


def case_named(name: str) -> Case:
    """Build a network by its name: `bert`, `bert+MASKED_LM`, `timm/resnet18`, `torchvision/swin_t`."""
    family, _, rest = name.partition("/")
    return FAMILIES[family][1](rest) if rest and family in FAMILIES else transformers_case(name)


def names_of(family: str) -> list[str]:
    """Return the names of a family's networks."""
    names = FAMILIES[family][0]()
    return names if family == "transformers" else [f"{family}/{name}" for name in names]


TIMM = """
    beit_base_patch16_224 eca_botnext26ts_256 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32
    test_convnext cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m
    deit_tiny_patch16_224 densenet121 dla60x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0
    test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0
    fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224
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
    alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 mnasnet0_5 maxvit_t mobilenet_v2
    mobilenet_v3_small regnet_x_400mf resnet18 shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11 vit_b_32 r3d_18
    s3d mvit_v1_b swin3d_t
"""


def timm_case(name: str) -> Case:
    """Build a network of timm through transformers' wrapper, for images as small as it takes."""
    import timm
    from transformers import AutoModelForImageClassification, TimmWrapperConfig

    own = timm.get_pretrained_cfg(name).to_dict()["input_size"][-1]
    first: Exception | None = None
    for size in (64, 96, 128, own):
        for given in ({}, {"img_size": size}):
            torch.manual_seed(0)
            try:
                config = TimmWrapperConfig(architecture=name, model_args=given, num_labels=2)
                network = AutoModelForImageClassification.from_config(config)
                batch = {"pixel_values": _random(ROWS, 3, size, size), "labels": torch.arange(ROWS) % 2}
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
    network = Vision(torchvision.models.get_model(name, weights=None, num_classes=2))
    size = {"inception_v3": 96, "maxvit_t": 224, "vit_b_32": 224}.get(name, 64)
    images = [_random(ROWS, 3, size, size), _random(ROWS, 3, 8, size, size), _random(ROWS, 3, 16, 224, 224)]
    case = case_of(network, True, [{"pixel_values": image, "labels": torch.arange(ROWS) % 2} for image in images])
    children = network.network.named_children()
    stages = [name for name, child in children if isinstance(child, nn.Sequential) and list(child.parameters())]
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

    def _layer(self) -> nn.Module:
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
    batch = {"input_ids": _ids(), "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long), "labels": _ids()}
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
        return Case(network, {"input_values": _random(ROWS, SAMPLES)}, "audio")
    ids = case.batch.get("input_ids", _ids())
    ids = ids if ids.ndim == 2 else _ids()
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    text["attention_mask"] = case.batch.get("attention_mask", text["attention_mask"])
    network = GPT2LMHeadModel(small_config(GPT2Config, {"vocab_size": _vocabulary(case.network)}))
    network.loss_type = "ForCausalLM"
    return Case(network, text, "text")


def _vocabulary(network: Any) -> int:
    config = getattr(network, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None) or VOCABULARY
