"""The cards of the committed results are what `make cards` makes of them, and say what the results say."""

import copy
import importlib
import json
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
from cards import check_card
from huggingface_hub import HfApi
from transformers import TrainingArguments

from hf_guidance import GuidanceConfig
from hf_guidance.analysis.figures import DIGEST
from hf_guidance.card.command import published_command
from hf_guidance.experiments.cards import (
    _folder,
    draw,
    facts_of,
    first_guided,
    model_card_of,
    push_runs,
    write_model_cards,
)

REPOSITORY = Path(__file__).parents[2]
CARDS = REPOSITORY / "model_cards"
REPORTS = {path.stem: json.loads(path.read_text()) for path in sorted((REPOSITORY / "recipes/results").glob("*.json"))}
RUNS = [(name, run) for name, report in REPORTS.items() for run in first_guided(report)]


@pytest.mark.parametrize(("name", "run"), RUNS, ids=[f"{name}-{run['run']}" for name, run in RUNS])
def test_a_committed_card_is_what_make_cards_makes_and_has_its_figures(name, run, tmp_path):
    place = CARDS / name / run["run"]
    text = model_card_of(run, REPORTS[name], name)
    assert (place / "README.md").read_text() == text, "run `make cards` and commit what it writes"
    metadata, body = check_card(text)
    figures = set(re.findall(r"!\[[^]]+\]\(([^)]+)\)", body))
    assert figures == {"comparison.png"} | ({"similarity.png"} if "similarity_maps" in run else set())
    draw(run, REPORTS[name], tmp_path)
    for figure in figures:
        committed, now = (PIL.Image.open(folder / figure).text[DIGEST] for folder in (place, tmp_path))
        assert committed == now, f"{figure} shows something else: run `make cards` and commit what it writes"
    value = next(m["value"] for m in metadata["model-index"][0]["results"][0]["metrics"] if m["name"] == "loss")
    assert value == run["test"]["loss"]
    assert f"| {run['test']['loss']:.4f} " in body
    assert f"{run['parameters']:,} parameters" in body
    assert run["guide"]["fingerprint"] in body
    part = run["run"].endswith(("_stopped", "_decayed"))
    own = "a step, guided or not, on average" if part else "a step with guidance"
    assert [row for row in re.findall(r"^\| (a step[^|]*?) +\|", body, re.M) if row != "a step without"] == [own]
    for pair in run["similarity"][-1].keys() - {"step"}:
        ends = [end.replace("_", r"\_") for end in pair.split("~")]
        first, last = (f"{run['similarity'][i][pair]:.3f}" for i in (0, -1))
        row = rf"^\| {re.escape(ends[0])} +\| {re.escape(ends[1])} +\| {first} +\| {last} +\|( [\d.]+ +\|)?$"
        assert re.search(row, body, re.M)  # the last column is of another measure


@pytest.mark.parametrize("name", REPORTS)
def test_the_command_of_a_committed_result_is_published_word_for_word(name, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "recipes")
    parsers = (importlib.import_module(REPORTS[name]["recipe"]).Arguments, TrainingArguments, GuidanceConfig)
    assert published_command(shlex.split(REPORTS[name]["command"]), parsers) == (REPORTS[name]["command"], False)


def test_there_is_a_card_for_every_guided_run_and_none_besides():
    there = {tuple(path.relative_to(CARDS).parts[:-1]) for path in CARDS.glob("*/*/README.md")}
    assert there == {(name, run["run"]) for name, run in RUNS}


def test_make_cards_writes_them_with_their_figures(tmp_path):
    name, run = RUNS[0]
    results = tmp_path / "results"
    results.mkdir()
    (results / f"{name}.json").write_text(json.dumps(REPORTS[name] | {"runs": [run]}))
    assert write_model_cards(results, tmp_path / "cards") == [tmp_path / "cards" / name / run["run"]]
    assert {path.name for path in (tmp_path / "cards" / name / run["run"]).iterdir()} >= {"README.md", "comparison.png"}


def test_a_card_is_rendered_in_less_than_a_second_and_without_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a card asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    name, run = RUNS[0]
    began = time.process_time()
    model_card_of(run, REPORTS[name], name)
    assert time.process_time() - began < 1


FROM_WHEEL = """
import json, sys
import hf_guidance
from hf_guidance.experiments.cards import first_guided, model_card_of
assert hf_guidance.__file__.startswith(sys.argv[1]), hf_guidance.__file__
report = json.load(open(sys.argv[2], encoding="utf-8"))
print(model_card_of(first_guided(report)[0], report, sys.argv[3]), end="")
"""


def test_a_card_is_the_same_from_a_built_wheel(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    name, run = RUNS[0]
    words = [tmp_path / "installed", REPOSITORY / "recipes" / "results" / f"{name}.json", name]
    made = subprocess.run(
        [sys.executable, "-c", FROM_WHEEL, *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert made.stdout == model_card_of(run, REPORTS[name], name)


def test_a_card_shows_what_its_run_kept_and_the_command_that_made_all_the_runs_it_is_compared_with():
    own = {"cost": {"hardware": "a loom"}, "command": "accelerate launch recipes/one.py", "command_is_cut": True}
    run = {"run": "guided", "seed": 3, "card": own, "guide": {}}
    command = "accelerate launch recipes/all.py --seeds 0 3 --output_dir outputs/all"
    expected = {"cost": own["cost"], "command": command, "folder": "outputs/all/seed-3/guided"}
    assert facts_of(run, {"command": command, "runs": [run]}) == expected
    for elsewhere in (command.replace("outputs", "/outputs"), command.split(" --output_dir")[0]):
        assert "folder" not in facts_of(run, {"command": elsewhere, "runs": [run]})


def test_a_run_that_kept_no_facts_has_no_card():
    runs = [
        {"run": "alone", "guide": None},
        {"run": "guided", "guide": {}},
        {"run": "guided", "guide": {}, "card": {1: 1}},
    ]
    assert first_guided({"runs": runs}) == runs[2:]


def test_paths_and_tokens_in_a_command_do_not_reach_a_card():
    name, run = RUNS[0][0], copy.deepcopy(RUNS[0][1])
    words = ["--output_dir", "/home/me/out", "--text_files", "/home/me/a b.txt", "--hub_token", "hf_" + 34 * "a"]
    words += ["--use_cpu", "--dataset", "file:///data/me/images"]
    report = REPORTS[name] | {"command": shlex.join(["accelerate", "launch", "recipes/r.py", *words])}
    report["command_is_cut"] = True
    run["card"]["data"]["task"] = "Read /home/me/secret/a.txt and `hf_" + 34 * "a" + "`."
    text = model_card_of(run, report, name)
    check_card(text)
    shown = re.search(r"```sh\n(.*?)\n```\n\nArguments other than the known .* are left out\.", text, re.DOTALL)[1]
    command = "accelerate launch recipes/r.py --output_dir out --text_files 'a b.txt' --hub_token '<token>' --use_cpu"
    assert shlex.split(shown.replace("\\\n", "")) == shlex.split(f"{command} --dataset images")
    assert r"Read a.txt and \`&lt;token&gt;\`." in text


def test_a_card_is_pushed_to_the_branch_of_its_run_and_if_not_it_is_said_how(tmp_path, monkeypatch, caplog, capsys):
    asked = []

    def upload(self, **options):
        asked.append(options | {"files": [path.name for path in options["folder_path"].iterdir()]})
        if len(asked) == 2:
            raise OSError("no Hub today")
        return SimpleNamespace(repo_url=f"https://hub.test/{options['repo_id']}")

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    runs = [{"seed": 0, "run": name, "card": {"repository": f"me/{name}"}} for name in ("one", "two")]
    places = [tmp_path / "seed-0" / run["run"] for run in runs]
    (tmp_path / "outside").write_text("PRIVATE")
    for place in places:
        place.mkdir(parents=True)
        for name in ("README.md", "settings.json", "model.safetensors"):
            (place / name).write_text(name)
        (place / "curves.png").symlink_to(tmp_path / "outside")
    with pytest.raises(ConnectionError, match="me/two: not pushed"):
        push_runs({"runs": runs}, places, "hf_x", "trial")
    assert [(call["repo_id"], call["files"], call["revision"]) for call in asked] == [
        ("me/one", ["README.md"], "trial"),
        ("me/two", ["README.md"], "trial"),
    ]
    assert not (places[0] / "_push").exists()
    assert capsys.readouterr().out == "pushed: https://hub.test/me/one, branch trial\n"
    assert f"(no Hub today). To push it: hf upload me/two {places[1]}/_push . --revision trial" in caplog.text
    assert "hf_x" not in caplog.text


def test_a_model_that_waits_for_its_push_goes_with_its_card_in_one_commit(tmp_path, uploads, caplog):
    place = tmp_path / "seed-0" / "one"
    (place / "_push").mkdir(parents=True)
    (place / "_push" / "model.safetensors").write_text("weights")
    for name in ("README.md", "comparison.png", "settings.json"):
        (place / name).write_text(name)
    report = {"runs": [{"seed": 0, "run": "one", "card": {"repository": "me/one"}}]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "upload_folder", lambda self, **_: [].pop())
        with pytest.raises(ConnectionError, match="me/one: not pushed"):
            push_runs(report, [place], None)
    assert f"To push it: hf upload me/one {place}/_push ." in caplog.text
    push_runs(report, [place], None)
    push_runs(report, [place], None)
    assert [(title, sorted(files)) for title, files in uploads] == [
        ("End of training", ["README.md", "comparison.png", "model.safetensors"]),
        ("Card with the runs it is compared with", ["README.md", "comparison.png"]),
    ]


def test_the_folder_of_a_claim_is_that_of_its_flags():
    for recipe in ("rnn_vs_transformer", "fcn_vs_resnet"):
        for name, flags in runpy.run_path(str(REPOSITORY / "recipes" / f"{recipe}.py"))["CLAIMS"].items():
            assert f"--output_dir outputs/claims/{name}" in " ".join(flags.split())
    report = {"command": "accelerate launch recipes/a.py --claim parity", "claim": "parity"}
    assert _folder({"seed": 3, "run": "trained_guide"}, report) == "outputs/claims/parity/seed-3/trained_guide"
