"""The guide of a pushed target, rebuilt; configs that would fetch, run or fill a machine are refused before."""

import contextlib
import faulthandler
import io
import json
import subprocess
from types import SimpleNamespace

import psutil
import pytest
from transformers import CONFIG_MAPPING

from hf_guidance import GuidanceConfig, load_guide_of
from hf_guidance.guide import size
from hf_guidance.guide.rebuilding import _check_numbers

HOSTILE = [
    ({"guidance": {"measure": "/etc/passwd"}}, "Unknown measure '/etc/passwd'"),
    ({"guidance": {"weight": 1}}, r"Unknown guidance fields \['weight'\]"),
    ({"guidance": {"max_tokens": "many"}}, "max_tokens is 'many'"),
    ({"guide": {"seed": "0; import os"}}, "seed is '0; import os'"),
    ({"guide": {"seed": 10**30}}, "seed is 1"),
    ({"guide": {"fingerprint": "sha256:" + "x" * 64}}, "fingerprint is 'sha256:xxx"),
    ({"guide": {"untrained": False, "source": "/home/me/guide"}}, "was a local folder called '/home/me/guide'"),
    ({"guide": {"source": None, "config": None}}, "was a module of the user's own"),
    ({"guide": {"config": {"model_type": "gpt2", "n_layer": 10**9}}}, "n_layer is '1000000000'"),
    ({"guidance": {"guidance_weight": 10**400}}, "guidance_weight is 1000"),
    ({"guide": {"config": {"model_type": "gpt2", "n_head": 0}}}, "cannot be built from its config"),
    ({"guide": {"config": {"model_type": "gpt2", "blocks": [[1, [2000]]]}}}, r"blocks is '\[\[1, \[2000"),
    ({"guide": {"config": {"model_type": "gpt2", "depth": 1001}}}, "depth is '1001'"),
    ({"guide": {"config": {"model_type": "../evil"}}}, r"model_type is '\.\./evil'"),
    ({"guide": {"config": {"model_type": "gpt2", "text_config": {"n_layer": 10**9}}}}, "n_layer is '1000000000'"),
    (
        {"guide": {"config": {"model_type": "gpt2", "n_embd": 3 * 2**18, "n_layer": 900}}},
        "network of [0-9,]{15,} param",
    ),
    (  # 12 · 4096² · 70 = 14e9 parameters
        {"guide": {"config": {"model_type": "gpt2", "n_embd": 2**12, "n_head": 32, "n_layer": 70}}},
        r"parameters and its buffers takes 5\d\.\d GiB, but only 8\.0 GiB are free",
    ),
    ({"guide": {"config": {"model_type": "gpt2", "num_labels": 2**24}}}, "num_labels is '16777216'"),
    # embeddings 17 · 8 + 1024 · 8, a block of 32 + 216 + 72 + 288 + 264, a last norm of 16
    ({"guide": {"parameters": 5}}, "makes a network of 9,216 parameters, but it states 5"),
    ({"guide": {"config": {"model_type": "gpt2", "attn_implementation": "evil/kernel"}}}, "attn_implementation is"),
    (
        {"guide": {"config": {"model_type": "timm_wrapper", "model_args": {"checkpoint_path": "weights.pth"}}}},
        "checkpoint_path is 'weights.pth'",
    ),
    ({"guide": {"config": {"model_type": "timm_wrapper", "architecture": "hf-hub:evil/net"}}}, "architecture is 'hf-"),
    ({"guide": {"config": {"model_type": "detr", "use_pretrained_backbone": True}}}, "use_pretrained_backbone is"),
    ({"guide": {"config": {"model_type": "upernet", "backbone": "gpt2"}}}, "takes the backbone 'gpt2' from elsewhere"),
    (
        {"guide": {"config": {"model_type": "timm_wrapper", "architecture": "nets"}}},
        "architecture 'nets', which is not",
    ),
    ({"guide": {"config": {"model_type": "gpt2", "auto_map": {"AutoModel": "evil.Net"}}}}, "AutoModel is 'evil.Net'"),
    ({"guide": {"config": {"model_type": "gpt2", "kernel_file": {"a": [{"b": "evil"}]}}}}, "b is 'evil'"),
    ({"guide": {"config": {"model_type": "gpt2", "cache_dir": {"size": "all"}}}}, "size is 'all'"),
    ({"guide": {"config": {"model_type": "swin", "depths": [1] * 10**5}}}, r"depths is '\[1, 1, 1"),
    ({"guide": {"config": {"model_type": "swin", "depths": [500, 501]}}}, r"depths is '\[500, 501\]'"),
    ({"guide": {"config": {"model_type": "swin", "num_heads": [[1] * 600, [1] * 600]}}}, r"num_heads is '\[\[1, 1"),
    ({"guide": {"config": {"model_type": "swin", "window_size": 4097}}}, "window_size is '4097'"),
    (
        {"guide": {"config": {"model_type": "timm_wrapper", "model_args": {"img_size": 16384}}}},
        "img_size is '16384'",
    ),
    (  # masks of 80,000² bytes, in a buffer and on the way there
        {
            "guide": {
                "config": {
                    "model_type": "gpt_neo",
                    "max_position_embeddings": 80000,
                    "num_layers": 1,
                    "attention_types": [[["global"], 1]],
                    "hidden_size": 8,
                    "num_heads": 2,
                }
            }
        },
        r"parameters and its buffers takes 11\.9 GiB, but only 8\.0 GiB are free",
    ),
]


@pytest.fixture
def measured_here(monkeypatch):
    """Measure in this process what another would: `test_size.py` starts such processes."""
    monkeypatch.setattr(size, "_limit_memory", lambda more: None)
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *args, **kwargs: None)

    def run(command, input, **options):
        printed = io.StringIO()
        with monkeypatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr("sys.stdin", io.StringIO(input))
            size.main(size.SECONDS, psutil.virtual_memory().available)
        return subprocess.CompletedProcess(command, 0, printed.getvalue(), "")

    monkeypatch.setattr(size.subprocess, "run", run)


@pytest.mark.parametrize(("change", "words"), HOSTILE)
@pytest.mark.usefixtures("measured_here")
def test_a_hostile_config_is_a_clear_error(change, words, tmp_path, monkeypatch):
    guide = {"source": "gpt2", "untrained": True, "seed": 0, "revision": None, "fingerprint": "sha256:" + "0" * 64}
    config = {"model_type": "gpt2", "vocab_size": 17, "n_embd": 8, "n_layer": 1, "n_head": 2}
    content = {"guidance": GuidanceConfig().to_dict(), "guide": guide | {"config": config}}
    content = {section: values | change.get(section, {}) for section, values in content.items()}
    (tmp_path / "guidance_config.json").write_text(json.dumps(content))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**33))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asks"))
    with pytest.raises(ValueError, match=words):
        load_guide_of(tmp_path)


@pytest.mark.usefixtures("measured_here")
@pytest.mark.parametrize("target", [None, 3, SimpleNamespace()])
def test_what_names_no_place_is_refused(target) -> None:
    with pytest.raises(
        ValueError, match=f"load_guide_of got a {type(target).__name__}; expected the Hub id or the folder"
    ):
        load_guide_of(target)


def test_a_folder_without_a_guidance_config_and_other_versions_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no guidance_config\.json: it is not a target that"):
        load_guide_of(tmp_path)
    with pytest.raises(
        ValueError, match=r"neither a folder nor a target on the Hub: there is no such folder \(seen from"
    ):
        load_guide_of("./nowhere")
    test_config = {"model_type": "gpt2", "vocab_size": 17, "n_embd": 8, "n_layer": 1, "n_head": 2}
    guide = {"source": "gpt2", "untrained": True, "seed": 0, "revision": None, "fingerprint": "sha256:" + "0" * 64}
    GuidanceConfig().save(tmp_path, guide | {"config": test_config, "versions": {"torch": "1.0"}})
    with pytest.raises(ValueError, match=r"is sha256:0000.* rebuilt one is sha256:.*made with \{'torch': '1\.0'\}"):
        load_guide_of(tmp_path)


def test_the_defaults_of_all_architectures_pass_the_check_of_numbers() -> None:
    found = {}
    for kind in CONFIG_MAPPING:
        try:
            config = json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
        except Exception:  # those that cannot be made without arguments, or not without a package
            continue
        try:
            _check_numbers(config)
        except ValueError as error:
            found[kind] = str(error)
    assert found == {}
