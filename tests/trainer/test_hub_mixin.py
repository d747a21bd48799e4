"""Pushes to a Hub over HTTP: what arrives, what does not, what a bad day leaves behind, and loading it back."""

import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import PIL.Image
import pytest
import torch
from builders import gpt2, llama
from cards import check_card, machine
from hub import Hub
from trainers import make_trainer

from hf_guidance.trainer.hub_mixin import PublishingMixin

SCRIPT = Path(__file__).parents[1] / "scripts" / "push.py"
REPOSITORY = "tester/guided-rnn"
KEY = f"model/{REPOSITORY}"
MODEL = {
    "README.md",
    "config.json",
    "configuration_plain_rnn.py",
    "curves.png",
    "generation_config.json",
    "guidance_config.json",
    "model.safetensors",
    "modeling_plain_rnn.py",
    "similarity.png",
    "tokenizer.json",
    "tokenizer_config.json",
}


UNREACHED = r"ConnectionError The Hub does not answer .* Nothing was trained: try again"


def run(hub, folder, *words, home=None, token=True):
    environment = os.environ | hub.environment(home or folder.parent / "home", token)
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(SCRIPT), str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    return done.stdout + done.stderr[-4000:]


def result(printed):
    assert "RESULT" in printed, printed[-4000:]
    return json.loads(printed.split("RESULT")[1].splitlines()[0])


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")

    def slow(method, path):  # so that a save finds the push of the one before still going on
        return 0.3 if "/preupload/" in path or method == "PUT" else None

    with Hub(folder / "hub", lfs=True, fault=slow) as hub:
        printed = run(hub, folder / "out", "push", "checkpoint", hub.token)
        (folder / "printed").write_text(printed)
        said = result(printed)
        hub.fault = None
        yield hub, said, folder


def test_the_last_push_and_the_pushes_of_checkpoints_carry_the_whole_model(pushed):
    hub, _, folder = pushed
    titles = {commit["title"]: commit["id"] for commit in hub.store.repos[KEY]["log"]}
    assert {"Training in progress, step 2", "Training in progress, step 4", "End of training"} <= set(titles)
    for title in ("Training in progress, step 2", "Training in progress, step 4", "End of training"):
        files = hub.store.files(KEY, titles[title])
        step = 2 if title.endswith("2") else 4
        assert files["model.safetensors"] == (folder / f"out/checkpoint-{step}/model.safetensors").read_bytes()
        assert {name for name in files if "/" not in name} - {".gitattributes"} == MODEL
        assert b"# guided-rnn" in files["README.md"]
    resumable = {n.removeprefix("last-checkpoint/") for n in hub.store.files(KEY) if n.startswith("last-checkpoint/")}
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "model.safetensors"} <= resumable
    assert hub.store.repos[KEY]["commits"][titles["End of training"]]["model.safetensors"]["lfs"]


def test_nothing_else_that_lies_in_the_output_folder_is_pushed_and_no_link_is_followed(pushed):
    hub, _, folder = pushed
    for commit in hub.store.repos[KEY]["log"]:
        files = hub.store.files(KEY, commit["id"])
        assert not [name for name, content in files.items() if b"PRIVATE" in content]
        assert {name for name in files if "/" not in name} - {".gitattributes"} <= MODEL
        extra = {"optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "rng_state.json"}
        own = {n.removeprefix("last-checkpoint/") for n in files if "/" in n}
        assert own in (set(), MODEL - {"README.md", "curves.png", "similarity.png"} | extra)
    assert {path.name for path in (folder / "outside").iterdir()} == {"own.txt"}
    assert (folder / "outside/own.txt").read_text() == "PRIVATE"
    assert not [path.name for path in (folder / "out").glob("_*")], "what has arrived is removed"
    for name in MODEL | {"checkpoint-4/config.json"}:
        assert not (folder / "out" / name).is_symlink()
        assert (folder / "out" / name).is_file()


def test_settings_go_up_without_paths_and_tokens_which_is_said_and_the_vocabulary_as_it_is(pushed):
    hub, _, folder = pushed
    printed = (folder / "printed").read_text()
    for prefix in ("", "last-checkpoint/"):
        config, note = (
            json.loads(hub.store.files(KEY)[f"{prefix}{name}"]) for name in ("config.json", "generation_config.json")
        )
        assert config["data_folder"] == "data"
        assert "api_key" not in config
        assert note["note"] == "made by <token> in out"
        words = json.loads(hub.store.files(KEY)[f"{prefix}tokenizer.json"])["added_tokens"]
        assert {"/usr/bin", "</s>", "hf_" + 20 * "a"} <= {word["content"] for word in words}
    assert re.search(r"config\.json is pushed without .*, in: (data_folder, api_key|api_key, data_folder)\.", printed)
    assert "generation_config.json is pushed without" in printed
    kept = json.loads((folder / "out/config.json").read_text())
    assert (kept["data_folder"], kept["api_key"]) == (f"{folder}/out/data", "abc")
    assert json.loads((folder / "out/checkpoint-4/config.json").read_text()) == kept


def test_nothing_of_the_machine_or_the_token_is_pushed(pushed):
    hub, _, folder = pushed
    for name, content in hub.store.files(KEY).items():
        for secret in map(re.escape, (hub.token, hub.base, str(folder))):
            assert not re.search(secret.encode(), content), (name, secret)
        if not name.endswith((".safetensors", ".pt", ".pth", ".png")):  # in which any word may occur
            assert not re.search(machine().encode(), content), name
    assert hub.token not in (folder / "printed").read_text()
    arguments = torch.load(folder / "out" / "training_args.bin", weights_only=False)
    assert (arguments.hub_token, arguments.output_dir) == (None, "out")


@pytest.fixture(scope="module")
def fetched(pushed):
    """Let another process load the repository, resume from it, and train without a stop."""
    hub, _, folder = pushed
    return result(run(hub, folder / "elsewhere", "load+resume+unbroken", REPOSITORY, home=folder / "other"))


def test_it_is_loaded_back_in_another_process_with_its_guide_and_its_figure(pushed, fetched):
    hub, made, _ = pushed
    loaded = fetched[0]
    assert loaded["guide"] == made["guide"]
    assert loaded["loss"] == pytest.approx(made["loss"], abs=1e-6)
    assert f"{made['loss']:.4f}" in hub.store.files(KEY)["README.md"].decode()


def test_training_goes_on_from_a_checkpoint_on_the_hub_as_if_it_had_not_stopped(fetched):
    _, resumed, unbroken = fetched
    assert (resumed["first"], resumed["last"]) == (4, 6)
    assert resumed["weights"] == unbroken["weights"]


# a process that has transformers and not this package, running what the cards say
WITHOUT = """
import json, re, sys
import importlib.util
from huggingface_hub import hf_hub_download
if importlib.util.find_spec("hf_guidance"):
    sys.exit("INSTALLED")
kinds = {}
for repository in sys.argv[1:]:
    card = open(hf_hub_download(repository, "README.md"), encoding="utf-8").read()
    names = {}
    exec(re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1], names)
    kinds[repository] = type(names["model"]).__module__.split(".")[0]
print("RESULT", json.dumps(kinds))
"""


@pytest.fixture(scope="module")
def toured(pushed):
    hub, _, folder = pushed
    hub.gated.add("model/tester/gated")
    said, rows = result(run(hub, folder / "tour", "tour+rows"))
    return said, rows


def test_the_code_in_the_cards_runs_as_printed_without_the_package(pushed, toured):
    hub, _, folder = pushed
    place = folder / "anywhere"
    place.mkdir()
    PIL.Image.new("RGB", (20, 30)).save(place / "image.png")
    packages = sysconfig.get_paths()["purelib"]  # where the .pth files of editable installs are not followed
    done = subprocess.run(
        [sys._base_executable, "-c", WITHOUT, REPOSITORY, "tester/image"],
        capture_output=True,
        text=True,
        env=os.environ | hub.environment(folder / "without") | {"PYTHONPATH": packages},
        cwd=place,
        check=False,
    )
    if "INSTALLED" in done.stderr:
        pytest.skip("the package is installed as a copy, so that no process is without it")
    assert result(done.stdout + done.stderr) == dict.fromkeys([REPOSITORY, "tester/image"], "transformers_modules")
    assert re.search(r"^t\d+( t\d+){20,}\n(even|odd)\nRESULT", done.stdout, re.MULTILINE), done.stdout


def test_private_gated_and_branches_open_for_who_may_and_explain_themselves_to_others(pushed, toured):
    hub, (said, _) = pushed[0], toured
    assert hub.store.repos["model/tester/private"]["private"]
    refusals = {"private": "no repository that this user may read", "gated": "the Hub gives access on request"}
    for name, words in refusals.items():
        assert re.search(f"{words}.*hf auth login", said[f"{name}, token False"])
        assert said[f"{name}, token None"] == "the same"
    assert said["branches, token None"] == "the same"
    assert set(hub.store.files("model/tester/branches", "trial")) >= MODEL
    assert not set(hub.store.files("model/tester/branches")) & MODEL


def test_a_large_file_goes_up_by_lfs_in_parts_and_comes_back_bit_for_bit(pushed, toured):
    hub, (said, _), folder = pushed[0], toured, pushed[2]
    repository, name = hub.store.repos["model/tester/large"], "model.safetensors"
    entry = repository["commits"][repository["branches"]["main"]][name]
    content = (folder / "tour" / "large" / name).read_bytes()
    sha = hashlib.sha256(content).hexdigest()
    assert len(content) > 2 * hub.part_size
    assert entry["lfs"]
    assert (entry["sha256"], entry["size"]) == (sha, len(content))
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(content)}\n".encode()
    assert entry["oid"] == hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    count = math.ceil(len(content) / hub.part_size)
    uploads = [request for request in hub.requests if f"/_lfs/{sha}" in request[1]]
    assert sorted(uploads[:-1]) == sorted(("PUT", f"/_lfs/{sha}/{i}") for i in range(1, count + 1))
    assert uploads[-1] == ("POST", f"/_lfs/{sha}")
    assert hub.store.files("model/tester/large")[name] == content
    assert said["large"] == "the same"


def test_all_checkpoints_are_pushed_where_they_are_asked_for(pushed, toured):
    files = set(pushed[0].store.files("model/tester/all"))
    assert {name for name in files if "/" not in name} - {".gitattributes"} == MODEL
    assert {name.split("/")[0] for name in files if name.endswith("/optimizer.pt")} == {"checkpoint-1", "checkpoint-2"}


def test_a_pushed_target_is_a_guide_itself_and_is_found_again(pushed, toured):
    store, said = pushed[0].store, toured[0]
    assert said["chain"] == "the same"
    assert said["chain, token False"].startswith("Cannot load guide 'tester/private'"), "the guide is private"
    files = store.files("model/tester/chain")
    metadata, body = check_card(files["README.md"].decode())
    revision = store.repos["model/tester/private"]["branches"]["main"]
    own = json.loads(files["guidance_config.json"])["guide"]
    assert (own["source"], own["revision"], own["untrained"]) == ("tester/private", revision, False)
    assert (metadata["guide"], metadata["guide_revision"]) == ("tester/private", revision)
    assert f"[tester/private](https://huggingface.co/tester/private/tree/{revision})" in body
    assert re.search(rf"^@misc\{{guide,(\n.*)+note +=.* {revision}\}}$", body, re.MULTILINE)


def test_a_second_push_of_the_same_changes_nothing_but_the_card(pushed, toured):
    store = pushed[0].store
    first, second = (log["id"] for log in store.repos["model/tester/private"]["log"][-2:])
    changed = {
        name
        for name, content in store.files("model/tester/private", second).items()
        if store.files("model/tester/private", first).get(name) != content
    }
    assert changed <= {"README.md", "curves.png", "similarity.png"}


def test_a_dataset_is_pushed_and_streamed_back_and_a_card_knows_it(toured):
    rows = toured[1]
    assert rows["whole"] == rows["stream"] == [{"text": t, "label": n} for t, n in (("a", 0), ("b", 1), ("c", 0))]
    assert rows["facts"]["id"] == "tester/rows"
    assert re.fullmatch("[0-9a-f]{40}", rows["facts"]["revision"])


def test_every_pushed_card_is_whole_and_escapes_what_it_is_given(pushed, toured):
    store = pushed[0].store
    for name in ("guided-rnn", "private", "gated", "image"):
        metadata, body = check_card(store.files(f"model/tester/{name}")["README.md"].decode())
        validated = ", validation, and" if name == "guided-rnn" else " in training, and"
        assert f"![Task loss{validated} similarity of every pair](curves.png)" in body
        step = 4 if name == "guided-rnn" else 1
        shown = f"on rows to validate with, without dropout, before training and at step {step}"
        assert f"![Similarity of all layers {shown}]" in body
        for figure in ("curves.png", "similarity.png"):
            assert store.files(f"model/tester/{name}")[figure].startswith(b"\x89PNG")
        assert re.search(r"^\| a step with guidance +\| [\d.e-]+ s of CPU time +\|$", body, re.MULTILINE)
        assert "## How to reproduce it\n\n```sh\npython push.py\n```\n\nArguments other than the known " in body
    assert "x: y" in metadata["tags"]
    assert metadata["pipeline_tag"] == "image-classification"
    assert r"a\|b&lt;script&gt;" in body
    assert "<script>" not in body
    assert "| 8 × 8 pixels" in body


def test_the_card_has_no_gap_and_says_where_it_is_from(pushed):
    hub, _, _ = pushed
    metadata, body = check_card(hub.store.files(KEY)["README.md"].decode())
    assert metadata["tags"][:4] == ["hf_guidance", "guidance", "arxiv:2410.20035", "text-generation"]
    assert (metadata["pipeline_tag"], metadata["license"], metadata["library_name"]) == (
        "text-generation",
        "mit",
        "transformers",
    )
    assert f'name = "{REPOSITORY}"\n' in body
    assert "AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)" in body
    assert f'load_guide_of("{REPOSITORY}")' in body
    assert re.search(r"\| random, seed 5 +\|", body)


def test_a_hub_that_is_not_reached_is_found_before_training(tmp_path):
    with Hub(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "home") | {"HF_ENDPOINT": "http://127.0.0.1:9"}
        hub.environment = lambda *_: environment
        printed = run(hub, tmp_path / "out", "push")
    assert re.search(f"ERROR {UNREACHED}", printed)
    assert "'loss'" not in printed


@pytest.fixture(scope="module")
def bad_day(tmp_path_factory):
    """A Hub on which commits fail, one kind of failure per repository, and what the pushes said of it."""
    folder, down = tmp_path_factory.mktemp("bad"), [True]
    some = {"interrupted": iter([500]), "flaky": iter([500, 0.3])}  # and then all is well

    def fault(method, path):
        found = re.match(r"/api/models/tester/(\w+)/commit/", path)
        if not found or not down:
            return None
        name = found[1]
        return next(some[name], None) if name in some else int(name) if name.isdigit() else name

    with Hub(folder / "hub", lfs=True, fault=fault) as hub:
        printed = run(hub, folder / "out", "bad_day")
        down.clear()
        yield hub, result(printed), printed, folder


@pytest.mark.parametrize("fault", ["500", "cut", "down", "401"])
def test_a_push_that_fails_at_the_end_loses_nothing_and_its_command_works_later(fault, bad_day):
    hub, said, _, folder = bad_day
    assert said[fault].startswith(f"The push to tester/{fault} failed")
    assert {path.name for path in (folder / "out" / fault).iterdir()} >= MODEL
    command = said[fault].split("To push it later: ")[1]
    staged = folder / "out" / fault / "_push"
    assert command == f"hf upload tester/{fault} {staged} ."
    assert {path.name for path in staged.iterdir()} == MODEL
    done = subprocess.run(
        [str(Path(sys.executable).parent / "hf"), *shlex.split(command)[1:]],
        env=os.environ | hub.environment(folder / "home"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(hub.store.files(f"model/tester/{fault}")) - {".gitattributes"} == MODEL


def test_a_push_interrupted_half_way_is_completed_by_the_next_one(bad_day):
    hub, said, _, _ = bad_day
    assert "500" in said["interrupted"]
    weights = hub.store.repos["model/tester/interrupted"]
    tree = weights["commits"][weights["branches"]["main"]]
    assert set(tree) >= MODEL
    uploads = [path for method, path in hub.requests if method == "PUT"]
    assert uploads.count(f"/_lfs/{tree['model.safetensors']['sha256']}") == 1  # the first push's, not sent again


def test_a_hub_that_fails_and_is_slow_during_training_does_not_end_it(bad_day):
    hub, said, printed, _ = bad_day
    assert said["flaky"] == 4
    assert re.search(r"push.* failed .*(Training continues|The last push uploads everything)", printed)
    assert set(hub.store.files("model/tester/flaky")) >= MODEL


def test_a_token_that_may_only_read_is_found_before_training(bad_day):
    assert re.search(
        r"may not write to tester/flaky \(.*403.*\)\. Nothing was trained: log in with a token", bad_day[1]["reader"]
    )


def test_a_wrong_token_and_a_process_that_is_offline_are_found_before_training(bad_day):
    said, folder = bad_day[1], bad_day[3]
    assert re.match(r"\w+ .*(401|Invalid username or password)", said["wrong token"])
    assert re.match(UNREACHED, said["offline"])
    assert not list((folder / "out" / "refused").glob("checkpoint-*"))


def test_only_what_the_last_save_wrote_is_the_models(tmp_path):
    own = make_trainer(tmp_path / "out", gpt2(), llama())
    assert isinstance(own, PublishingMixin)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "notes.txt").write_text("PRIVATE")
    own.save_model()
    saved = own._saved[tmp_path / "out"]
    assert {"model.safetensors", "config.json", "guidance_config.json"} <= set(saved)
    assert "notes.txt" not in saved
