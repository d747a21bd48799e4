"""The size of a network, measured in a process that is ended if it takes too long or too much."""

import faulthandler
import io
import json
import sys

import pytest

from hf_guidance.guide import size
from hf_guidance.guide.size import size_of


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "evil"},
        {"model_type": "gpt2", "n_embd": -8, "n_head": 2},
        {"model_type": "gpt2", "n_embd": 8.5, "n_head": 2},
        {"model_type": "gpt2", "n_embd": [[1, 2]]},
    ],
)
def test_a_config_of_no_network_is_an_error_and_not_the_end_of_the_process(config, monkeypatch, capsys) -> None:
    monkeypatch.setattr(size, "_limit_memory", lambda more: None)  # of this process
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *args, **kwargs: None)
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(config)))
    size.main(60, 2**30)
    assert list(json.loads(capsys.readouterr().out)) == ["error"]


def test_what_takes_too_long_to_lay_out_is_ended() -> None:
    with pytest.raises(ValueError, match="laying it out and building it takes too long"):
        size_of({"model_type": "gpt2"}, seconds=0.01)


def test_what_takes_more_than_its_weights_say_is_ended() -> None:
    """A Fourier transform as a matrix of complex numbers, by scipy: 16 · 14000² bytes."""
    sizes = {"hidden_size": 14000, "num_hidden_layers": 1, "intermediate_size": 1, "vocab_size": 8}
    sizes |= {"max_position_embeddings": 8, "tpu_short_seq_length": 8, "use_tpu_fourier_optimizations": True}
    with pytest.raises(ValueError, match=r"allocate|memory"):
        size_of({"model_type": "fnet", **sizes})


def test_the_size_is_that_of_parameters_and_buffers_and_modules_in_the_present_folder_are_not_run(
    tmp_path, monkeypatch
) -> None:
    for name in ("psutil.py", "json.py", "torch.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [place for place in sys.path if place])
    sizes = {"vocab_size": 17, "max_position_embeddings": 300, "hidden_size": 8, "num_heads": 2, "num_layers": 1}
    found = size_of({"model_type": "gpt_neo", "attention_types": [[["global"], 1]], **sizes})
    assert not (tmp_path / "ran").exists()
    block = 3 * 64 + (64 + 8) + (8 * 32 + 32) + (32 * 8 + 8) + 4 * 8  # queries, keys, values; out; two layers; norms
    assert found.parameters == 17 * 8 + 300 * 8 + block + 2 * 8
    assert found.weights == 4 * found.parameters + 300**2  # the mask's booleans
    assert found.largest == 300**2
