"""Tokenizers built on the spot: a list of symbols, and byte pairs trained on a text."""

import pytest
from transformers import AutoTokenizer

from hf_guidance.tasks.vocabulary import symbol_tokenizer, train_byte_pairs

TEXT = ["the cat sat on the mat, the cat sat on the hat\n"] * 20


def test_symbols_are_numbered_in_their_order_and_padding_comes_last(tmp_path):
    symbol_tokenizer(["a", "b", "<go>"]).save_pretrained(tmp_path)
    for tokenizer in (symbol_tokenizer(["a", "b", "<go>"]), AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer("b <go> a")["input_ids"] == [1, 2, 0]
        assert tokenizer.decode([1, 2, 0]) == "b <go> a"
        assert (tokenizer.pad_token_id, len(tokenizer)) == (3, 4)
        batch = tokenizer(["a b", "a"], padding=True)
        assert (batch["input_ids"], batch["attention_mask"]) == ([[0, 1], [0, 3]], [[1, 1], [1, 0]])


def test_byte_pairs_write_any_text_and_are_the_same_for_the_same_text():
    tokenizer = train_byte_pairs(TEXT, 280)
    for text in (TEXT[0], "Ωéü — never\n\n  seen\t"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 280
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.get_vocab() == train_byte_pairs(iter(TEXT), 280).get_vocab()


def test_merges_are_learnt_from_the_text():
    words = len(train_byte_pairs(TEXT, 280)("the cat")["input_ids"])
    assert words < len(train_byte_pairs(["xyz"], 257)("the cat")["input_ids"]) == len("the cat")


def test_fewer_tokens_than_bytes_are_an_error():
    with pytest.raises(ValueError, match="vocab_size must exceed the 256 bytes, got 256"):
        train_byte_pairs(TEXT, 256)
