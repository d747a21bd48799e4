"""Batches that a small network may take, by the names of its forward's arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from small_configs import FRAMES, IMAGE, LENGTH, MELS, ROWS, SAMPLES, WIDTH
from torch import Tensor


def random_values(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) * 2 - 1


def token_ids(length: int = LENGTH, most: int = 50, seed: int = 0) -> Tensor:
    return torch.randint(5, most, (ROWS, length), generator=torch.Generator().manual_seed(seed))


def batches_for(network: Any, with_head: bool) -> Iterator[dict[str, Any]]:
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
    two: list[str] = [
        n for n in ("pixel_values", "input_ids", "attention_mask", "input_features", "input_values") if n in named
    ]
    two += [
        n
        for n in (
            "actions",
            "rewards",
            "returns_to_go",
            "timesteps",
            "visual_feats",
            "visual_pos",
            "image_embeds_position_mask",
        )
        if n in named
    ]
    decoder = [n for n in ("decoder_input_ids",) if n in named]
    masks = ["input_features_mask", "past_time_features", "past_observed_mask", "future_values", "future_time_features"]
    choices: list[list[str]] = []
    some: list[list[str]] = [[], decoder, two, [*two, *decoder], ["decoder_input_values"]]
    some += [["input_ids", "attention_mask", "bbox"], masks, [*two, *masks], [*masks, *decoder]]
    for more in [*some, ["attention_mask", "encoder_hidden_states"], ["flattened_patches", *decoder]]:
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
        ids = torch.cat([torch.full((ROWS, count), token), token_ids()], 1)
        mask = torch.ones_like(ids)
        text = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(ids == token, -100, ids)}
        if "mm_token_type_ids" in named:
            text["mm_token_type_ids"] = (ids == token).long()
        if "token_type_ids" in named:
            text["token_type_ids"] = (ids == token).long()
        if "image_grid_thw" in named:
            patches = {"pixel_values": random_values(ROWS * 16, 3 * 2 * 8 * 8)}
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
        return token_ids(3)
    if "TokenClassification" in name:
        return token_ids() % 2
    return token_ids(seed=1) if getattr(network.config, "is_encoder_decoder", False) else token_ids()


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
        lambda: random_values(ROWS, channels, height, width),
        lambda: random_values(ROWS, 3, 2 * IMAGE, 2 * IMAGE),
        lambda: random_values(ROWS, 3, 4 * IMAGE, 4 * IMAGE),
        lambda: random_values(ROWS, video, channels, height, width),
        lambda: random_values(ROWS, 1, channels, height, width),
        lambda: random_values(ROWS, 16, channels * 8 * 8),
    ]
    spoken = [
        lambda: random_values(ROWS, mels, frames),
        lambda: random_values(ROWS, frames, mels),
        lambda: random_values(ROWS, 1, 4 * FRAMES, mels),
        lambda: random_values(ROWS, 1, 2 * FRAMES, mels),
        lambda: random_values(ROWS, 160, FRAMES),
        lambda: random_values(ROWS, FRAMES, 160),
    ]
    series = find("context_length", default=8)
    longest = find("max_length", "max_time_bins", default=frames)
    waves = [
        lambda: random_values(ROWS, SAMPLES),
        lambda: random_values(ROWS, 1, SAMPLES),
        lambda: random_values(ROWS, frames, mels),
        lambda: random_values(ROWS, longest, mels),
    ]
    lags = max(find("lags_sequence", default=[0]))
    coming = find("prediction_length", default=4)
    return {
        "input_ids": [token_ids],
        "attention_mask": [lambda: torch.ones(ROWS, LENGTH, dtype=torch.long)],
        "decoder_input_ids": [lambda: token_ids(seed=1)],
        "decoder_input_values": [lambda: random_values(ROWS, LENGTH, mels)],
        "flattened_patches": [lambda: torch.cat([torch.ones(ROWS, 16, 2), random_values(ROWS, 16, WIDTH)], 2)],
        "image_embeds_position_mask": [lambda: (torch.arange(LENGTH) < 4).long().repeat(ROWS, 1)],
        "qformer_input_ids": [token_ids],
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
        "hidden_states": [lambda: random_values(ROWS, LENGTH, WIDTH), lambda: random_values(ROWS * 16, 3 * 2 * 8 * 8)],
        "inputs": [token_ids],
        "inputs_embeds": [lambda: random_values(ROWS, LENGTH, WIDTH)],
        "encoder_hidden_states": [lambda: random_values(ROWS, LENGTH, WIDTH)],
        "query_embeds": [lambda: random_values(ROWS, LENGTH, WIDTH)],
        "past_values": [
            lambda: random_values(ROWS, series + lags),
            lambda: random_values(ROWS, series, find("num_input_channels", default=1)),
        ],
        "past_time_features": [lambda: random_values(ROWS, series + lags, 1)],
        "past_observed_mask": [lambda: torch.ones(ROWS, series + lags)],
        "future_values": [lambda: random_values(ROWS, coming)],
        "future_time_features": [lambda: random_values(ROWS, coming, 1)],
        "grid_thw": [lambda: torch.tensor([[1, 4, 4]] * ROWS)],
        "image_grid_thw": [lambda: torch.tensor([[1, 4, 4]] * ROWS)],
        "visual_feats": [lambda: random_values(ROWS, 4, find("visual_feat_dim", default=WIDTH))],
        "visual_pos": [lambda: random_values(ROWS, 4, 4)],
        "states": [lambda: random_values(ROWS, LENGTH, 5)],
        "actions": [lambda: random_values(ROWS, LENGTH, 3)],
        "rewards": [lambda: random_values(ROWS, LENGTH, 1)],
        "returns_to_go": [lambda: random_values(ROWS, LENGTH, 1)],
        "timesteps": [lambda: torch.arange(LENGTH).repeat(ROWS, 1)],
        "image": [lambda: random_values(ROWS, 3, IMAGE, IMAGE)],
    }
