"""ResNets without skip connections. This file imports only its configuration, so it loads from the Hub without this
package.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithNoAttention, ImageClassifierOutputWithNoAttention
from transformers.utils.generic import can_return_tuple

from .configuration_plain_resnet import BLOCK_TYPES, PlainResNetConfig


class ConvNormReLU(nn.Module):
    """Convolution, batch norm and ReLU on `(batch, channels, height, width)`; divides height and width by `stride`."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.convolution(hidden)).relu()


class PlainResNetBlock(nn.Sequential):
    """The convolutions of a ResNet block without its skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int, block_type: str) -> None:
        width = outputs // BLOCK_TYPES[block_type]
        if block_type == "basic":
            layers = [ConvNormReLU(inputs, outputs, 3, stride), ConvNormReLU(outputs, outputs, 3)]
        else:
            layers = [
                ConvNormReLU(inputs, width, 1),
                ConvNormReLU(width, width, 3, stride),
                ConvNormReLU(width, outputs, 1),
            ]
        super().__init__(*layers)


class PlainResNetPreTrainedModel(PreTrainedModel):
    """Base class of the ResNets without skips: configuration, initialisation and transformers' class attributes."""

    config: PlainResNetConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    _no_split_modules = ["PlainResNetBlock"]  # noqa: RUF012
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # As in torchvision's ResNet: He et al. for convolutions, torch's default for the classifier.
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.in_features**-0.5), module.in_features**-0.5)
        else:
            super()._init_weights(module)


class PlainResNetModel(PlainResNetPreTrainedModel):
    """A stem and a stack of blocks, which can return the output of every block."""

    def __init__(self, config: PlainResNetConfig) -> None:
        super().__init__(config)
        self.stem = ConvNormReLU(config.num_channels, config.embedding_size, 7, stride=2)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        sizes = [config.embedding_size, *config.hidden_sizes]
        self.blocks = nn.ModuleList(
            PlainResNetBlock(outputs if block else inputs, outputs, 1 if block or not stage else 2, config.block_type)
            for stage, (inputs, outputs) in enumerate(pairwise(sizes))
            for block in range(config.depths[stage])
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithNoAttention:
        """Compute the features of images.

        Args:
            pixel_values: Normalised images of any size, `(batch, num_channels, height, width)`.
            output_hidden_states: Whether to return every block's output; `None` follows the configuration.

        Returns:
            `last_hidden_state` `(batch, channels, height / 32, width / 32)`, and `hidden_states`: stem, block 1, …,
            block N, each `(batch, channels, height, width)`.
        """
        states = [self.pool(self.stem(pixel_values))]
        for block in self.blocks:
            states.append(block(states[-1]))
        shown = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithNoAttention(states[-1], tuple(states) if shown else None)


class PlainResNetForImageClassification(PlainResNetPreTrainedModel):
    """An image classifier on the mean over the positions of the last block."""

    def __init__(self, config: PlainResNetConfig) -> None:
        super().__init__(config)
        self.model = PlainResNetModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutputWithNoAttention:
        """Compute the logits of the classes for every image. Other arguments are those of `PlainResNetModel.forward`.

        Args:
            labels: Class of each image, `(batch,)`.

        Returns:
            `loss` (with labels), `logits` `(batch, num_labels)`, `hidden_states`.
        """
        outputs = self.model(pixel_values, **{**kwargs, "return_dict": True})
        logits = self.classifier(outputs.last_hidden_state.mean((2, 3)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss, logits, outputs.hidden_states)
