"""Fully connected targets. This file imports only its configuration, so it loads from the Hub without this package."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithNoAttention, ImageClassifierOutputWithNoAttention
from transformers.utils.generic import can_return_tuple

from .configuration_fcn import FCNConfig


class FCNBlock(nn.Module):
    """A block of Linear, batch norm, ReLU and dropout: `(batch, size)` to `(batch, hidden_size)`."""

    def __init__(self, config: FCNConfig, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, config.hidden_size)
        self.norm = nn.BatchNorm1d(config.hidden_size) if config.batch_norm else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.norm(self.linear(hidden)).relu())


class FCNPreTrainedModel(PreTrainedModel):
    """Base class of the fully connected models: configuration, initialisation and transformers' class attributes."""

    config: FCNConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    _no_split_modules = ["FCNBlock"]  # noqa: RUF012
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # As in torch; transformers' normal with std 0.02 would make the signal vanish over fifty layers.
        if isinstance(module, nn.Linear):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.in_features**-0.5), module.in_features**-0.5)
        else:
            super()._init_weights(module)


class FCNModel(FCNPreTrainedModel):
    """A stack of fully connected blocks on flattened pixels, which can return the output of every block."""

    def __init__(self, config: FCNConfig) -> None:
        super().__init__(config)
        sizes = [config.num_channels * config.image_size**2] + [config.hidden_size] * (config.num_hidden_layers - 1)
        self.blocks = nn.ModuleList(FCNBlock(config, size) for size in sizes)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithNoAttention:
        """Compute the features of images.

        Args:
            pixel_values: Normalised images, `(batch, num_channels, image_size, image_size)`.
            output_hidden_states: Whether to return every block's output; `None` follows the configuration.

        Returns:
            `last_hidden_state` `(batch, hidden_size)`, and `hidden_states`: the flattened pixels, block 1, …, block N,
            each `(batch, size)`.

        Raises:
            ValueError: If the images have another size.
        """
        shape = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.shape[1:] != shape:
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; expected (batch, {', '.join(map(str, shape))}), "
                "as configured by num_channels and image_size: a fully connected network takes one size only"
            )
        states = [pixel_values.flatten(1)]
        for block in self.blocks:
            states.append(block(states[-1]))
        shown = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithNoAttention(states[-1], tuple(states) if shown else None)


class FCNForImageClassification(FCNPreTrainedModel):
    """A fully connected image classifier."""

    def __init__(self, config: FCNConfig) -> None:
        super().__init__(config)
        self.model = FCNModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutputWithNoAttention:
        """Compute the logits of the classes for every image. Other arguments are those of `FCNModel.forward`.

        Args:
            labels: Class of each image, `(batch,)`.

        Returns:
            `loss` (with labels), `logits` `(batch, num_labels)`, `hidden_states`.
        """
        outputs = self.model(pixel_values, **{**kwargs, "return_dict": True})
        logits = self.classifier(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss, logits, outputs.hidden_states)
