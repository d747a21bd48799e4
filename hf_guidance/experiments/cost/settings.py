"""Networks and data of a cost measurement. Only their sizes matter, so weights and rows are random."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

from hf_guidance.experiments.cost.random_rows import RandomRows, random_images, random_tokens
from hf_guidance.guide.inputs import vocabulary_size
from hf_guidance.guide.loading import untrained_network
from hf_guidance.targets.vision import VISION_TARGETS, vision_target
from hf_guidance.tasks.pixel_formats import check_sees, check_takes, pixel_format_of

LABELS = 10


@dataclass(frozen=True)
class Setting:
    """The sizes of one measurement.

    Args:
        batch_size: Rows per batch.
        image_size: Image size of the target, in pixels; ignored by a language model.
        width: Width of an FCN's blocks; None means 512, and is required for other targets.
    """

    batch_size: int
    image_size: int
    width: int | None = None

    @property
    def name(self) -> str:
        """Return `batch/image/width`, as `parse_rows` reads it."""
        return "/".join(str(n) for n in (self.batch_size, self.image_size, self.width) if n is not None)


def parse_rows(texts: Sequence[str]) -> list[Setting]:
    """Parse texts of the form `batch/image/width`. Raise ValueError for anything else."""
    for text in texts:
        if not re.fullmatch(r"[1-9]\d*(/[1-9]\d*){2}", text):
            raise ValueError(f"--rows {text}: expected batch/image/width, such as 64/64/512, or table.")
    return [Setting(*map(int, text.split("/"))) for text in texts]


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
