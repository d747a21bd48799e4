"""Small configs of every architecture of transformers: each size is cut by the name of its field."""

from __future__ import annotations

import importlib.util
import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

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
SWIN = {
    "window_size": 2,
    "patch_size": 4,
    "image_size": 64,
    "depths": [1, 2, 1, 1],
    "num_heads": [2, 2, 4, 4],
    "embed_dim": 16,
}
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
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp"], "n_groups": 2},
    "sam_vision_model": {"num_pos_feats": WIDTH // 2, "output_channels": WIDTH},
    "sam_hq_vision_model": {"num_pos_feats": WIDTH // 2, "output_channels": WIDTH},
    "kosmos-2": {"latent_query_num": 4},
    "pix2struct_text_model": {"initializer_range": 0.02},
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


# ----------------------------------------------------------------------------------------------------------- configs


def small_config(cls: Any, given: dict[str, Any] | None = None) -> Any:
    """Make a small config of a class of transformers: each size at its largest value of the table, parts likewise."""
    given = {**OVERRIDES.get(cls.model_type, {}), **(given or {})}
    parts = _parts_of(cls)
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
    if (out := values.get("out_indices") or values.get("out_features")) and "num_hidden_layers" in defaults:
        count = len(out)
        values |= {"out_indices": list(range(1, count + 1)), "num_hidden_layers": max(count, 3)}
        values.pop("out_features", None)
    return cls(**values)


def _parts_of(cls: Any) -> dict[str, Any]:
    """Return name → what a part's config is by default. Earlier versions of transformers tell it by an instance."""
    if hasattr(PreTrainedConfig, "sub_configs_defaults"):
        return cls.sub_configs_defaults
    found = {name: getattr(cls(), name, None) for name in cls.sub_configs}
    return {
        name: SimpleNamespace(optional=value is None, init_kwargs={}, config_class=type(value))
        for name, value in found.items()
    }


def _has_mrope(cls: Any) -> bool:
    """Tell whether a config's rotary positions are of several axes, of which the default sizes are too large."""
    if re.match("cohere_compass|neomme", cls.model_type):
        return False
    module = cls.__module__.replace(".configuration_", ".modeling_")
    found = importlib.util.find_spec(module)
    return bool(found and found.origin and "mrope_section" in Path(found.origin).read_text(encoding="utf-8"))


def _class_of(spec: Any) -> Any:
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
    "TOKEN_CLASSIFICATION", "TIME_SERIES_PREDICTION", "MASK_GENERATION", "UNIVERSAL_SEGMENTATION",
    "ZERO_SHOT_OBJECT_DETECTION", "RNNT", "TDT", "IMAGE_TO_IMAGE", "KEYPOINT_DETECTION", "KEYPOINT_MATCHING",
    "POSE_ESTIMATION", "TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM", "PRETRAINING", "QUESTION_ANSWERING", "RETRIEVAL",
    "BACKBONE",
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
    classes: Any = table.get(model_type)
    if classes is not None:
        import transformers

        name_of_class = classes[0] if isinstance(classes, (list, tuple)) else classes
        return getattr(transformers, name_of_class, None) or getattr(module, name_of_class), config
    own = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, nn.Module)]
    own = [c for c in own if getattr(c, "config_class", None) is config and "PreTrained" not in c.__name__]
    if not own:
        raise LookupError(f"no network of transformers is made from a {config.__name__}")
    return min(own, key=lambda c: (not c.__name__.endswith("Model"), len(c.__name__))), config
