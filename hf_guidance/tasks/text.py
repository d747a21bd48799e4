"""Language modelling on a streamed dataset or on local text files."""

from __future__ import annotations

from functools import partial

import numpy as np
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, EvalPrediction, PreTrainedTokenizerBase, default_data_collator

from .base import IGNORED_LABEL, Task, main_logits
from .blocks import lines, load_splits, make_blocks, read_files, stream_blocks
from .vocabulary import train_byte_pairs


def language_modeling(
    dataset: str = "Salesforce/wikitext",
    dataset_config: str | None = "wikitext-103-raw-v1",
    text_files: list[str] | None = None,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    block_size: int = 32,
    streaming: bool = True,
    max_eval_blocks: int = 2048,
    seed: int = 0,
) -> Task:
    """Build the task of predicting the next token of running text, cut into blocks of equal length.

    Args:
        dataset: Hub id or local folder with a column `text` and the splits train, validation and test.
        dataset_config: Name of its configuration; `"default"` or `None` if it has only one.
        text_files: UTF-8 files to read instead of `dataset`. They are joined and cut at line ends: the first 90 % of
            the characters for training, 5 % for validation, 5 % for the test.
        tokenizer: Hub id or folder of a tokenizer; `None` trains a byte-level BPE on the first ten million
            characters of the training text.
        vocab_size: Number of tokens of that BPE.
        block_size: Tokens in a row.
        streaming: Whether to stream the training split of `dataset`, shuffled within a buffer; otherwise it is
            downloaded and held in memory.
        max_eval_blocks: Maximum number of rows for validation, and for the test, from the beginning of each split.
        seed: Seed of the stream's order.

    Returns:
        The task; its metrics are `perplexity` per token and `word_perplexity`. Words are separated by white space in
        the decoded blocks, which equal the text if the tokenizer can reproduce it.

    Raises:
        ValueError: If a file, a split or the column `text` is missing, or if a split is too short for one block.

    Source: Subramaniam et al., NeurIPS 2025 (arXiv 2410.20035), language modelling on WikiText-103.
    """
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2, because the first token is not predicted; got {block_size}")
    if max_eval_blocks < 1:
        raise ValueError(f"max_eval_blocks must be at least 1, got {max_eval_blocks}")
    splits = load_splits(dataset, dataset_config, streaming) if text_files is None else read_files(text_files)
    train, source = splits["train"], dataset if text_files is None else ", ".join(text_files)
    if tokenizer:
        vocabulary = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    else:
        vocabulary = train_byte_pairs(lines(train), vocab_size)
    return Task(
        name="language_modeling",
        description=f"Predict the next token of {source}.",
        train_dataset=stream_blocks(train, vocabulary, block_size, seed)
        if streaming and text_files is None
        else make_blocks(train, "train", vocabulary, block_size),
        eval_dataset=make_blocks(splits["validation"], "validation", vocabulary, block_size, max_eval_blocks),
        test_dataset=make_blocks(splits["test"], "test", vocabulary, block_size, max_eval_blocks),
        data_collator=default_data_collator,
        processing_class=vocabulary,
        compute_metrics=partial(_perplexity, tokenizer=vocabulary),
        preprocess_logits_for_metrics=token_losses,
        metric="perplexity",
        higher_is_better=False,
        percent=False,
    )


def token_losses(outputs: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Compute the negative log-likelihood of each token but the first, in nats; perplexity needs no more.

    Args:
        outputs: Logits, `(batch, length, vocab_size)`, or a tuple of outputs that begins with them.
        labels: Tokens, `(batch, length)`, -100 where there is none.

    Returns:
        `(batch, length - 1)`, float32, 0 where there is no label.
    """
    logits, targets = main_logits(outputs)[:, :-1].flatten(0, 1), labels[:, 1:]
    losses = cross_entropy(logits.float(), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none")
    return losses.view(targets.shape)


def _perplexity(prediction: EvalPrediction, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Compute perplexities from losses `(n, length - 1)` and labels `(n, length)`."""
    from .metrics import Perplexity

    labels = np.asarray(prediction.label_ids)
    scored = np.asarray(prediction.predictions)[labels[:, 1:] != IGNORED_LABEL]
    tokens = labels[labels != IGNORED_LABEL]
    words = len(str(tokenizer.decode(tokens, skip_special_tokens=True)).split())
    return Perplexity().compute(predictions=scored, tokens_per_word=tokens.size / max(words, 1))
