"""Configuration of the recurrent targets. It imports nothing from this package, so it loads from the Hub without it."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

CELL_TYPES = ("tanh", "gru", "lstm")


class RNNConfig(PreTrainedConfig):
    """Sizes of a stacked recurrent network. The defaults are those of the paper's copy-paste target.

    Args:
        vocab_size: Number of tokens.
        embedding_size: Width of the token embeddings; `None` means `hidden_size`.
        hidden_size: Width of every recurrent layer's state.
        num_hidden_layers: Number of stacked recurrent layers.
        cell_type: Type of the recurrent layers: `"tanh"` (Elman), `"gru"` or `"lstm"`.
        dropout: Probability of zeroing an activation between two recurrent layers.
        initializer_range: Standard deviation of the initial embeddings and heads. Recurrent layers are
            initialised as in torch, uniform in ±1/√hidden_size.
        use_cache: Whether inference returns the states of the layers, from which `generate` continues.
        tie_word_embeddings: Whether the language model's head is the embedding matrix.
        pad_token_id: Token that pads a batch. The attention mask, not this token, marks padding.
        bos_token_id: Token that starts a text.
        eos_token_id: Token (or tokens) that ends a text.

    Raises:
        ValueError: If a size is below 1, the cell type is unknown, dropout is outside [0, 1), or the embeddings are
            tied to a head of another width.

    Source: target of the copy-paste and language modelling experiments, Subramaniam et al., NeurIPS 2025
    (arXiv 2410.20035).
    """

    model_type = "plain_rnn"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]  # transformers from 5.24, before

    vocab_size: int = 50257
    embedding_size: int | None = None
    hidden_size: int = 512
    num_hidden_layers: int = 4
    cell_type: str = "tanh"
    dropout: float = 0.0
    initializer_range: float = 0.1
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        super().__post_init__(**kwargs)
        for name in ("vocab_size", "embedding_size", "hidden_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.cell_type not in CELL_TYPES:
            raise ValueError(f"unknown cell_type {self.cell_type!r}; choose one of {', '.join(CELL_TYPES)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1), got {self.dropout}")
        if self.tie_word_embeddings and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"tie_word_embeddings needs embedding_size == hidden_size, got {self.embedding_size} and "
                f"{self.hidden_size}; leave embedding_size out or set tie_word_embeddings=False"
            )
