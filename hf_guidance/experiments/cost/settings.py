"""Networks and data of a cost measurement. Only their sizes matter, so weights and rows are random."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    set_seed,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

from hf_guidance.config import GuidanceConfig
from hf_guidance.experiments.cost.random_rows import RandomRows, random_images, random_tokens
from hf_guidance.guide.inputs import vocabulary_size
from hf_guidance.guide.loading import untrained_network
from hf_guidance.targets import RNNConfig, RNNForCausalLM
from hf_guidance.targets.vision import VISION_TARGETS, vision_target
from hf_guidance.tasks.pixel_formats import check_sees, check_takes, pixel_format_of

LABELS = 10
VOCABULARY, LAYERS = 1000, 4  # of rows of text


@dataclass(frozen=True)
class Setting:
    """The sizes of one measurement.

    Args:
        batch_size: Rows per batch.
        image_size: Image size of the target, in pixels; ignored by a language model.
        width: Width of an FCN's blocks; None means 512, and is required for other targets.
        length: Tokens per row, of a plain RNN of `width` that a GPT-2 guides; None for all other networks.
        guide_width: Width of that GPT-2.
    """

    batch_size: int
    image_size: int
    width: int | None = None
    length: int | None = None
    guide_width: int | None = None

    @property
    def name(self) -> str:
        """Return `batch/image/width`, or `batchxlength/width/guide width`, as `parse_rows` reads it."""
        if self.length is not None:
            return f"{self.batch_size}x{self.length}/{self.width}/{self.guide_width}"
        return "/".join(str(n) for n in (self.batch_size, self.image_size, self.width) if n is not None)

    def guidance(self, guidance: GuidanceConfig) -> GuidanceConfig:
        """Return the settings of guidance for this row: those of text compare tokens of hidden states."""
        if self.length is None:
            return guidance
        return replace(guidance, sample_axis="token", target_layers=["hidden_states"], guide_layers=["hidden_states"])


def parse_rows(texts: Sequence[str]) -> list[Setting]:
    """Parse texts of the form `batch/image/width`, or `batchxlength/width/guide width` for text.

    Raises:
        ValueError: If a text has another form.
    """
    found = []
    for text in texts:
        images, tokens = re.fullmatch(r"(\d+)/(\d+)/(\d+)", text), re.fullmatch(r"(\d+)x(\d+)/(\d+)/(\d+)", text)
        match = images or tokens
        if match is None or "0" in match.groups():
            raise ValueError(
                f"--rows {text}: expected batch/image/width, such as 64/64/512, or table; or for text "
                "batchxlength/width/guide width, such as 16x64/64/128, or text."
            )
        sizes = [int(number) for number in match.groups()]
        found.append(Setting(*sizes) if images else Setting(sizes[0], 0, sizes[2], sizes[1], sizes[3]))
    return found


def text_guide(setting: Setting, seed: int) -> nn.Module:
    """Build the untrained GPT-2 of a row of text: 4 layers of its guide width."""
    assert setting.guide_width is not None
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=setting.guide_width, n_layer=LAYERS, n_head=4)
    set_seed(seed)
    return GPT2LMHeadModel(config)


@dataclass(frozen=True)
class Networks:
    """The target and the guide of a measurement.

    Args:
        target: One of `VISION_TARGETS`, Hub id, folder or `timm/<architecture>`.
        guide: Name of the guide, which decides its image size.
        depth: Depth of one of the `VISION_TARGETS`; None takes the paper's.
        guide_image_size: Image size of the guide, in pixels; None takes what the guide needs, or the target's.
        length: Tokens per row of a language model.
    """

    target: str
    guide: str
    depth: int | None = None
    guide_image_size: int | None = None
    length: int = 128

    def build(self, setting: Setting, guide: nn.Module, batches: int, seed: int) -> tuple[PreTrainedModel, RandomRows]:
        """Build the target, from torch's random state, and rows for both networks.

        Args:
            setting: Sizes of the measurement.
            guide: The guide.
            batches: Number of batches of rows.
            seed: Seed of the rows.

        Raises:
            ValueError: If there is no such target, it has no such size, or the guide cannot take the images.
        """
        count = batches * setting.batch_size
        if setting.length is not None:
            assert setting.width is not None
            config = RNNConfig(vocab_size=VOCABULARY, hidden_size=setting.width, num_hidden_layers=LAYERS)
            rnn = RNNForCausalLM(config)
            return rnn, random_tokens(count, setting.length, VOCABULARY, seed=seed)
        if self.target in VISION_TARGETS:
            target, size = self._vision_target(setting), setting.image_size
        else:
            kind = self._auto_class()
            if setting.width or self.depth:
                raise ValueError(f"width and depth apply to {', '.join(VISION_TARGETS)} only: leave them out.")
            target = untrained_network(self.target, kind)
            if target.main_input_name == "input_ids":
                vocabulary = min(v for v in (vocabulary_size(target), vocabulary_size(guide)) if v)
                return target, random_tokens(count, self.length, vocabulary, seed=seed)
            size = pixel_format_of(self.target, setting.image_size, trained=False).size
        check_sees(guide, self.guide)
        own = pixel_format_of(self.guide, size, trained=False, given=self.guide_image_size)
        check_takes(guide, own, self.guide)
        labels = target.config.num_labels or LABELS
        return target, random_images(count, size, labels, guide_size=own.size, seed=seed)

    def _vision_target(self, setting: Setting) -> PreTrainedModel:
        if self.target == "resnet50_without_skips":
            if setting.width:
                raise ValueError("width applies to the FCNs only; a ResNet takes depth 18, 34 or 50.")
            return vision_target(self.target, setting.image_size, depth=self.depth, num_labels=LABELS)
        width = setting.width or 512
        return vision_target(self.target, setting.image_size, width=width, depth=self.depth, num_labels=LABELS)

    def _auto_class(self) -> type:
        if self.target.startswith("timm/") and not os.path.isdir(self.target):
            return AutoModelForImageClassification
        try:
            kind = AutoConfig.from_pretrained(self.target, trust_remote_code=False).model_type
        except (OSError, ValueError) as error:
            raise ValueError(
                f"target {self.target!r} is none of {', '.join(VISION_TARGETS)}, and cannot be loaded: "
                f"{str(error).splitlines()[0]}"
            ) from error
        if kind in (*MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, "fcn", "plain_resnet"):
            return AutoModelForImageClassification
        if kind in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "rnn"):
            return AutoModelForCausalLM
        raise ValueError(f"target {self.target!r} is of type {kind}: neither an image classifier nor a language model.")
