"""Pushes to a Hub over HTTP: what arrives, what does not, what a bad day leaves behind, and loading it back."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import Hub

from hf_guidance import GuidanceConfig, load_guide_of

SCRIPT = Path(__file__).parent / "scripts" / "push.py"
REPOSITORY = "tester/guided-rnn"
KEY = f"model/{REPOSITORY}"
MODEL = {
    "README.md",
    "config.json",
    "configuration_plain_rnn.py",
    "generation_config.json",
    "guidance_config.json",
    "model.safetensors",
    "modeling_plain_rnn.py",
    "tokenizer.json",
    "tokenizer_config.json",
}


def run(hub, folder, *words, home=None, token=True):
    environment = os.environ | hub.environment(home or folder.parent / "home", token)
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(SCRIPT), str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    return done.stdout + done.stderr[-4000:]


def result(printed):
    assert "RESULT" in printed, printed[-4000:]
    return json.loads(printed.split("RESULT")[1].splitlines()[0])


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    with Hub(folder / "hub", lfs=True) as hub:
        yield hub, result(run(hub, folder / "out", "push", "checkpoint", hub.token)), folder


def test_the_last_push_and_the_pushes_of_checkpoints_carry_the_whole_model(pushed):
    hub, _, _ = pushed
    titles = {commit["title"]: commit["id"] for commit in hub.store.repos[KEY]["log"]}
    assert {"Training in progress, step 2", "Training in progress, step 4", "End of training"} <= set(titles)
    for title in ("Training in progress, step 2", "End of training"):
        files = hub.store.files(KEY, titles[title])
        assert {name for name in files if "/" not in name} - {".gitattributes"} == MODEL | (
            set() if "progress" in title else {"training_args.bin"}
        )
        assert b"# guided-rnn" in files["README.md"]
    resumable = {n.removeprefix("last-checkpoint/") for n in hub.store.files(KEY) if n.startswith("last-checkpoint/")}
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "model.safetensors"} <= resumable
    assert hub.store.repos[KEY]["commits"][titles["End of training"]]["model.safetensors"]["lfs"]


def test_nothing_of_the_machine_or_the_token_is_pushed(pushed):
    hub, _, folder = pushed
    for name, content in hub.store.files(KEY).items():
        for secret in (hub.token, str(folder), os.uname().nodename if len(os.uname().nodename) > 5 else hub.token):
            assert secret.encode() not in content, (name, secret)
    arguments = torch.load(io.BytesIO(hub.store.files(KEY)["training_args.bin"]), weights_only=False)
    assert (arguments.hub_token, arguments.output_dir) == (None, "out")


def test_it_is_loaded_back_in_another_process_with_its_guide_and_its_figure(pushed):
    hub, made, folder = pushed
    loaded = result(run(hub, folder / "elsewhere", "load", REPOSITORY, home=folder / "other"))
    assert loaded["guide"] == made["guide"]
    assert loaded["loss"] == pytest.approx(made["loss"], abs=1e-6)
    assert f"{made['loss']:.4f}" in hub.store.files(KEY)["README.md"].decode()
    assert result(run(hub, folder / "resumed", "resume", REPOSITORY, home=folder / "other"))["step"] == 6


WITHOUT = """
import sys
sys.modules["hf_guidance"] = None  # any import of the package raises
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print("RESULT", "{}" if type(model).__module__.startswith("transformers_modules") else type(model))
"""


def test_it_is_loaded_without_the_package_by_its_own_code(pushed):
    hub, _, folder = pushed
    environment = os.environ | hub.environment(folder / "without")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, REPOSITORY], capture_output=True, text=True, env=environment, check=False
    )
    assert "RESULT {}" in done.stdout, done.stderr[-3000:]


def test_the_card_has_no_gap_and_says_where_it_is_from(pushed):
    hub, _, _ = pushed
    card = hub.store.files(KEY)["README.md"].decode()
    front, body = card.split("---\n")[1:3]
    import yaml

    metadata = yaml.safe_load(front)
    assert metadata["tags"][:2] == ["hf_guidance", "guidance"]
    assert (metadata["pipeline_tag"], metadata["license"], metadata["library_name"]) == (
        "text-generation",
        "mit",
        "transformers",
    )
    assert not re.search(r"\b(None|nan|inf)\b|\{\{|\{%|\n#+ [^\n]*\n+(?=#|$)", body)
    assert f'AutoModelForCausalLM.from_pretrained("{REPOSITORY}", trust_remote_code=True)' in body
    assert f'load_guide_of("{REPOSITORY}")' in body
    assert re.search(r"\| random, seed 5 +\|", body)


def test_a_wrong_token_is_found_before_training(tmp_path):
    with Hub(tmp_path / "hub") as hub:
        hub.token = "hf_other"
        environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": "hf_wrong"}
        hub.environment = lambda *_: environment
        printed = run(hub, tmp_path / "out", "push")
    assert re.search(r"ERROR \w+ .*(401|Invalid username or password)", printed), printed[-2000:]
    assert "'loss'" not in printed


@pytest.mark.parametrize("fault", [500, "cut"])
def test_a_push_that_fails_at_the_end_loses_nothing_and_its_command_works_later(fault, tmp_path):
    down = [True]
    with Hub(tmp_path / "hub", fault=lambda method, path: fault if down and "/commit/" in path else None) as hub:
        printed = run(hub, tmp_path / "out", "push", "end")
        assert "ERROR ConnectionError The push to tester/guided-rnn failed" in printed, printed[-3000:]
        assert {path.name for path in (tmp_path / "out").iterdir()} >= MODEL
        command = printed.split("To push it later: ")[1].splitlines()[0]
        assert command.startswith("hf upload tester/guided-rnn ")
        down.clear()
        done = subprocess.run(
            [str(Path(sys.executable).parent / "hf"), *shlex.split(command)[1:]],
            env=os.environ | hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert set(hub.store.files(KEY)) >= MODEL


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
    ({"guide": {"config": {"model_type": "../evil"}}}, r"model_type is '\.\./evil'"),
    ({"guide": {"config": {"model_type": "evil"}}}, "cannot be built from its config"),
    ({"guide": {"config": {"model_type": "gpt2", "text_config": {"n_layer": 10**9}}}}, "n_layer is '1000000000'"),
    (
        {"guide": {"config": {"model_type": "gpt2", "n_embd": 3 * 2**18, "n_layer": 900}}},
        "network of [0-9,]{15,} param",
    ),
    # embeddings 17 · 8 + 1024 · 8, a block of 32 + 216 + 72 + 288 + 264, a last norm of 16
    ({"guide": {"parameters": 5}}, "makes a network of 9,216 parameters, and it says 5"),
    ({"guide": {"config": {"model_type": "gpt2", "attn_implementation": "evil/kernel"}}}, "attn_implementation is"),
    (
        {"guide": {"config": {"model_type": "timm_wrapper", "model_args": {"checkpoint_path": "weights.pth"}}}},
        "checkpoint_path is 'weights.pth'",
    ),
    ({"guide": {"config": {"model_type": "timm_wrapper", "architecture": "hf-hub:evil/net"}}}, "architecture is 'hf-"),
    ({"guide": {"config": {"model_type": "detr", "use_pretrained_backbone": True}}}, "use_pretrained_backbone is"),
]


@pytest.mark.parametrize(("change", "words"), HOSTILE)
def test_a_hostile_config_is_a_clear_error(change, words, tmp_path):
    guide = {"source": "gpt2", "untrained": True, "seed": 0, "revision": None, "fingerprint": "sha256:" + "0" * 64}
    config = {"model_type": "gpt2", "vocab_size": 17, "n_embd": 8, "n_layer": 1, "n_head": 2}
    content = {"guidance": GuidanceConfig().to_dict(), "guide": guide | {"config": config}}
    content = {section: values | change.get(section, {}) for section, values in content.items()}
    (tmp_path / "guidance_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        load_guide_of(tmp_path)


def test_a_folder_without_a_guidance_config_and_other_versions_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no guidance_config\.json: it is not a target that"):
        load_guide_of(tmp_path)
    test_config = {"model_type": "gpt2", "vocab_size": 17, "n_embd": 8, "n_layer": 1, "n_head": 2}
    guide = {"source": "gpt2", "untrained": True, "seed": 0, "revision": None, "fingerprint": "sha256:" + "0" * 64}
    GuidanceConfig().save(tmp_path, guide | {"config": test_config, "versions": {"torch": "1.0"}})
    with pytest.raises(ValueError, match=r"is sha256:0000.* rebuilt is sha256:.*made with \{'torch': '1\.0'\}"):
        load_guide_of(tmp_path)
