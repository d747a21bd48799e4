"""Recurrent targets. This file imports only its configuration, so it loads from the Hub without this package."""

from dataclasses import fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration_plain_rnn import RNNConfig

CELLS = {"tanh": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
# The argument and output name of the states, which changed in transformers 5.24.
CACHE = "cache" if "cache" in {f.name for f in fields(BaseModelOutputWithPast)} else "past_key_values"
State = tuple[Tensor, ...]  # (hidden,), or an LSTM's (hidden, cell); each (1, batch, hidden_size)


class RNNCache:
    """The states of all layers, which `generate` takes in place of keys and values."""

    is_compileable = False

    def __init__(self, num_layers: int) -> None:
        self.states: list[State | None] = [None] * num_layers
        self.seq_length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions read so far, padding included."""
        return self.seq_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row `i` continue from row `beam_idx[i]`, as beam search requires after each token."""
        self.states = [state and tuple(part.index_select(1, beam_idx) for part in state) for state in self.states]


class _ValidFirst:
    """A permutation that moves the valid positions of each row to its front, so that states do not see padding first.

    Sorting stays on the device. Packing alone would wait for the lengths on the host in every training step.
    """

    def __init__(self, mask: Tensor) -> None:
        self.padding = mask == 0  # (batch, length)
        self.lengths = mask.shape[1] - self.padding.sum(1)
        self.order = self.padding.int().argsort(dim=1, stable=True)
        self.inverse = self.order.argsort(dim=1)

    def apply(self, hidden: Tensor) -> Tensor:
        return hidden.take_along_dim(self.order[..., None], dim=1)

    def undo(self, hidden: Tensor) -> Tensor:
        return hidden.take_along_dim(self.inverse[..., None], dim=1).masked_fill(self.padding[..., None], 0)


def _run(layer: nn.Module, inputs: Any, state: State | None = None) -> tuple[Any, State]:
    """Run a layer over `inputs`, `(batch, length, size)`.

    Returns:
        The outputs, `(batch, length, hidden_size)`, and the last state.
    """
    outputs, new_state = layer(inputs, state[0] if state and len(state) == 1 else state)
    return outputs, new_state if isinstance(new_state, tuple) else (new_state,)


def _run_packed(layer: nn.Module, inputs: Tensor, state: State | None, lengths: Tensor) -> tuple[Tensor, State]:
    """Run a layer as `_run` does, and return the state after the first `lengths` positions of each row.

    Only `generate` needs that state.
    """
    packed = pack_padded_sequence(inputs, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
    outputs, new_state = _run(layer, packed, state)
    outputs, _ = pad_packed_sequence(outputs, batch_first=True, total_length=inputs.shape[1])
    # Packing rejects empty rows, so they are read as one position and then get their old state back.
    old_state = state or tuple(torch.zeros_like(part) for part in new_state)
    pairs = zip(new_state, old_state, strict=True)
    return outputs, tuple(torch.where(lengths[:, None] > 0, new, old) for new, old in pairs)


class RNNPreTrainedModel(PreTrainedModel):
    """Base class of the recurrent models: configuration, initialisation and transformers' class attributes."""

    config: RNNConfig
    base_model_prefix = "model"
    _no_split_modules = ["RNN", "GRU", "LSTM"]  # noqa: RUF012
    _is_stateful = True  # assisted generation would need to roll a state back

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers initialises nn.LSTM differently and nn.RNN and nn.GRU not at all; here all start as in torch.
        if isinstance(module, nn.RNNBase):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        else:
            super()._init_weights(module)


class RNNModel(RNNPreTrainedModel):
    """Token embeddings and a stack of recurrent layers, which can return the output of every layer."""

    def __init__(self, config: RNNConfig) -> None:
        super().__init__(config)
        assert config.embedding_size is not None  # the configuration has set it
        sizes = [config.embedding_size] + [config.hidden_size] * config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.layers = nn.ModuleList(CELLS[config.cell_type](*pair, batch_first=True) for pair in pairwise(sizes))
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: RNNCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: RNNCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Read rows of tokens from left to right.

        Args:
            input_ids: Tokens, `(batch, length)`. Give either these or `inputs_embeds`.
            attention_mask: 0 at padding, on either side, else 1; `(batch, length)`, or longer by the positions that
                `cache` has read. Padding does not change states, and its outputs are 0.
            cache: States to continue from; updated in place.
            inputs_embeds: Embedded tokens, `(batch, length, embedding_size)`.
            use_cache: Whether to return the states; `None` follows the configuration, but returns none in training.
            output_hidden_states: Whether to return every layer's output; `None` follows the configuration.
            past_key_values: Name of `cache` before transformers 5.24.

        Returns:
            `last_hidden_state` `(batch, length, hidden_size)`, the cache, and `hidden_states`: embeddings,
            layer 1, ..., layer N, each `(batch, length, size)`, before dropout.

        Raises:
            ValueError: If both or neither of `input_ids` and `inputs_embeds` are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"give input_ids or inputs_embeds, got {'neither' if input_ids is None else 'both'}")
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        cache = RNNCache(len(self.layers)) if cache is None and use_cache else cache
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rows = None if attention_mask is None else _ValidFirst(attention_mask[:, -hidden.shape[1] :])
        shown = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = self._read(hidden, cache, rows)[0 if shown else -1 :]
        states = states if rows is None else [rows.undo(outputs) for outputs in states]
        return BaseModelOutputWithPast(states[-1], cache, tuple(states) if shown else None)  # type: ignore[arg-type]

    def _read(self, hidden: Tensor, cache: RNNCache | None, rows: _ValidFirst | None) -> list[Tensor]:
        """Compute embeddings and outputs of every layer, with valid positions first, and update the cache."""
        states = [hidden if rows is None else rows.apply(hidden)]
        for index, layer in enumerate(self.layers):
            inputs = self.dropout(states[-1]) if index else states[-1]
            if cache is None:
                outputs, _ = _run(layer, inputs)
            elif rows is None:
                outputs, cache.states[index] = _run(layer, inputs, cache.states[index])
            else:
                outputs, cache.states[index] = _run_packed(layer, inputs, cache.states[index], rows.lengths)
            states.append(outputs)
        if cache is not None:
            cache.seq_length += hidden.shape[1]
        return states


class RNNForCausalLM(RNNPreTrainedModel, GenerationMixin):
    """A recurrent language model, which predicts each token from those before it."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RNNConfig) -> None:
        super().__init__(config)
        self.model = RNNModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` then takes the cache that the first forward returns

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: RNNCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: RNNCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the logits of the next token at every position. Other arguments are those of `RNNModel.forward`.

        Args:
            labels: Tokens aligned with `input_ids`, -100 where there is none, `(batch, length)`. The loss shifts them.
            logits_to_keep: Number of last positions to score, or their indices; 0 means all.

        Returns:
            `loss` (with labels), `logits` `(batch, length, vocab_size)`, the cache, `hidden_states`.
        """
        kwargs["return_dict"] = True
        cache = past_key_values if cache is None else cache
        outputs = self.model(input_ids, attention_mask, cache, inputs_embeds, use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, getattr(outputs, CACHE), outputs.hidden_states)


class RNNForSequenceClassification(RNNPreTrainedModel):
    """A recurrent classifier on the output of the top layer at the last token."""

    def __init__(self, config: RNNConfig) -> None:
        super().__init__(config)
        self.model = RNNModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Compute the logits of the classes for every row. Other arguments are those of `RNNModel.forward`.

        Args:
            labels: Class of each row, `(batch,)`, or the format of `config.problem_type`.

        Returns:
            `loss` (with labels), `logits` `(batch, num_labels)`, `hidden_states`.
        """
        kwargs |= {"return_dict": True, "use_cache": False}
        outputs = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        hidden = outputs.last_hidden_state
        valid = hidden.new_ones(hidden.shape[:2]) if attention_mask is None else attention_mask
        last_valid = (torch.arange(hidden.shape[1], device=hidden.device) * (valid != 0)).argmax(1)
        logits = self.classifier(hidden.take_along_dim(last_valid[:, None, None], dim=1)[:, 0])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states)
