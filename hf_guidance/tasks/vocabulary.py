"""Tokenizers built on the spot: from a fixed list of symbols, or a BPE trained on a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, END = "<pad>", "<|endoftext|>"
CHARACTERS = 10_000_000  # length of the text that a BPE is trained on; more hardly changes it


def symbol_tokenizer(symbols: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer for symbols separated by spaces, numbered in the given order, with `<pad>` last.

    Args:
        symbols: All symbols; any other symbol in a text is an error.
    """
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, PAD])}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(backend, pad_token=PAD)


def train_byte_pairs(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode any text; the same texts always give the same one.

    Args:
        texts: Texts to learn the merges from; only the first ten million characters are used.
        vocab_size: Number of tokens: 256 bytes, `<|endoftext|>` (also for padding), and the merges.

    Raises:
        ValueError: If `vocab_size` is too small for the 256 bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"vocab_size must exceed the {len(alphabet)} bytes, got {vocab_size}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_beginning(texts), trainer)
    return _wrap(backend, pad_token=END, eos_token=END)


def _beginning(texts: Iterable[str]) -> Iterator[str]:
    left = CHARACTERS
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _wrap(backend: Tokenizer, **special_tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )
