"""Recurrent targets; loads from the Hub without this package, so it imports only its configuration from it."""

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
# What the forwards take and return the states as: transformers 5.24 gave it another name.
CACHE = "cache" if "cache" in {f.name for f in fields(BaseModelOutputWithPast)} else "past_key_values"
State = tuple[Tensor, ...]  # (hidden,), or an LSTM's (hidden, cell); each (1, batch, hidden_size)


class RNNCache:
    """One state per layer, all a recurrent network carries on; stands where `generate` expects keys and values."""

    is_compileable = False

    def __init__(self, num_layers: int) -> None:
        self.states: list[State | None] = [None] * num_layers
        self.seq_length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions read so far, padding included."""
        return self.seq_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row `i` continue from row `beam_idx[i]`, as beam search asks after each token."""
        self.states = [state and tuple(part.index_select(1, beam_idx) for part in state) for state in self.states]


class _ValidFirst:
    """Moves each row's valid positions to its front, and back, so that no state meets padding before a token.

    Sorting needs no lengths on the host; packing alone would wait for them at every training step.
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
    """Outputs (batch, length, hidden_size) of a layer over `inputs` (batch, length, size), and its last state."""
    outputs, new_state = layer(inputs, state[0] if state and len(state) == 1 else state)
    return outputs, new_state if isinstance(new_state, tuple) else (new_state,)


def _run_packed(layer: nn.Module, inputs: Tensor, state: State | None, lengths: Tensor) -> tuple[Tensor, State]:
    """As `_run`, with the state after each row's first `lengths` positions, which only `generate` needs."""
    packed = pack_padded_sequence(inputs, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
    outputs, new_state = _run(layer, packed, state)
    outputs, _ = pad_packed_sequence(outputs, batch_first=True, total_length=inputs.shape[1])
    # Packing refuses an empty row: such a row read one padding too many, and keeps the state it came with.
    old_state = state or tuple(torch.zeros_like(part) for part in new_state)
    pairs = zip(new_state, old_state, strict=True)
    return outputs, tuple(torch.where(lengths[:, None] > 0, new, old) for new, old in pairs)


class RNNPreTrainedModel(PreTrainedModel):
    """What the recurrent models share: configuration, initial weights and their place in transformers."""

    config: RNNConfig
    base_model_prefix = "model"
    _no_split_modules = ["RNN", "GRU", "LSTM"]  # noqa: RUF012
    _is_stateful = True  # a state cannot be rolled back, which assisted generation would need

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers leaves nn.RNN and nn.GRU alone and starts nn.LSTM its own way; here all start as in torch.
        if isinstance(module, nn.RNNBase):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        else:
            super()._init_weights(module)


class RNNModel(RNNPreTrainedModel):
    """Token embeddings and a stack of recurrent layers, each layer's output on show."""

    def __init__(self, config: RNNConfig) -> None:
        super().__init__(config)
        assert config.embedding_size is not None  # the configuration has filled it in
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
            input_ids: Tokens, `(batch, length)`; these or `inputs_embeds`.
            attention_mask: 0 at padding, on whichever side, else 1; `(batch, length)`, or longer by what `cache`
                has read. Padding touches no state, and its own outputs are 0.
            cache: States to continue from; updated in place.
            inputs_embeds: Embedded tokens, `(batch, length, embedding_size)`.
            use_cache: Whether to return the states; `None` means as configured, but not in training.
            output_hidden_states: Whether to return every layer's output; `None` means as configured.
            past_key_values: The name of `cache` before transformers 5.24.

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
        """Embeddings and every layer's outputs, each row's valid positions first; moves the cache along."""
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
    """A recurrent language model: predicts each token from those before it."""

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
        """Score the next token at every position; arguments as in `RNNModel.forward`, and two more.

        Args:
            labels: Tokens aligned with `input_ids` (the loss shifts them), -100 where none, `(batch, length)`.
            logits_to_keep: Number of last positions to score, or their indices; 0 means all.

        Returns:
            `loss` (if there are labels), `logits` `(batch, length, vocab_size)`, the cache, `hidden_states`.
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
    """A recurrent classifier: judges a text by the top layer's output at its last token."""

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
        """Score the classes of every row; arguments as in `RNNModel.forward`, and one more.

        Args:
            labels: Class of each row, `(batch,)`, or what `config.problem_type` asks for.

        Returns:
            `loss` (if there are labels), `logits` `(batch, num_labels)`, `hidden_states`.
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
