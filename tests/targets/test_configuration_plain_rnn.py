"""Configuration of the recurrent targets: errors, the sizes of the paper, and a way through a file."""

import pytest
from transformers import AutoConfig

from hf_guidance.targets import RNNConfig
from hf_guidance.targets.configuration_plain_rnn import CELL_TYPES
from hf_guidance.targets.modeling_plain_rnn import CELLS

VOCAB, PAD = 11, 0


def config(cell="tanh", **options):
    sizes = {"vocab_size": VOCAB, "embedding_size": 6, "hidden_size": 8, "num_hidden_layers": 3}
    return RNNConfig(**{**sizes, "cell_type": cell, "pad_token_id": PAD, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cell_type": "relu"}, "unknown cell_type 'relu'; choose one of tanh, gru, lstm"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout is a probability in \[0, 1\), got 1.0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings needs embedding_size == hidden_size, got 6 and 8"),
    ],
)
def test_bad_configurations_say_what_is_possible(options, words):
    with pytest.raises(ValueError, match=words):
        config(**options)


def test_every_configurable_cell_is_built():
    assert tuple(CELLS) == CELL_TYPES


def test_the_default_is_the_papers_copy_paste_target():
    config = RNNConfig()
    assert (config.cell_type, config.hidden_size, config.num_hidden_layers) == ("tanh", 512, 4)
    assert config.embedding_size == config.hidden_size


def test_a_saved_configuration_comes_back(tmp_path):
    config("lstm", dropout=0.25).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is RNNConfig
    assert (loaded.cell_type, loaded.dropout, loaded.pad_token_id) == ("lstm", 0.25, PAD)
    assert (loaded.vocab_size, loaded.embedding_size, loaded.hidden_size) == (VOCAB, 6, 8)
