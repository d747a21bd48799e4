"""The main job, run as a user runs it, in a size of seconds."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest
from cards import check_card
from hub import Hub
from launching import CONFIGS, Recipe, on_one_cpu, trains_parity

TINY = {
    "max_steps": 4,
    "eval_steps": 2,
    "logging_steps": 1,
    "save_steps": 2,
    "per_device_train_batch_size": 16,
    "eval_size": 32,
    "use_cpu": True,
}
TWO_STEPS = {"max_steps": 2, "eval_steps": 2, "save_steps": 2}
RUNS = ["alone", "guide_itself", "untrained_guide", "trained_guide"]
RECIPE = Recipe("rnn_vs_transformer", TINY)
run_here, launch = RECIPE.run_here, RECIPE.launch


@pytest.fixture(scope="module")
def copy_paste(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy_paste") / "out"
    with Hub(folder.parent / "hub") as hub:
        environment = os.environ | hub.environment(folder.parent / "home")
        process = launch(folder, env=environment, push_to_hub=True, hub_model_id="tester/copy", hub_token=hub.token)
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == 0, printed[-3000:]
        yield folder, printed, json.loads((folder / "results.json").read_text()), hub


def test_the_main_job_prints_a_table_and_leaves_results_figure_and_models(copy_paste):
    folder, printed, report, _ = copy_paste
    assert [run["run"] for run in report["runs"]] == RUNS
    for name in RUNS:
        assert re.search(rf"^\| {name.replace('_', ' ')} +\| 0 ", printed, re.MULTILINE)
        assert (folder / "seed-0" / name / "model.safetensors").is_file()
    assert (folder / "comparison.png").stat().st_size > 10_000
    assert {"torch", "transformers", "device", "threads"} <= set(report["environment"])
    begin, plan, end = (
        printed.index("4 runs × 1 seed (0) × 4 steps: alone,"),
        "none of these 4 runs is done",
        "4 of 4 runs",
    )
    assert begin < printed.index(plan) < printed.index("1 of 4 runs done, about ") < printed.index(end)
    page = (folder / "results.md").read_text()
    assert page.startswith(
        "# copy_paste: rnn_vs_transformer\n\n```sh\naccelerate launch recipes/rnn_vs_transformer.py "
    )
    assert "- untrained guide − alone, equal steps, test: " in page


CLEAN = """
import sys
from transformers import AutoModelForCausalLM
from hf_guidance.tasks import build_task
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
task = build_task("copy_paste", min_length=8, max_length=15, eval_size=32, test_size=32)
right = []
for row in task.test_dataset:
    batch = task.data_collator([row])
    labels = batch.pop("labels")[0, 1:]
    guesses = model(**batch).logits[0, :-1].argmax(-1)
    right += (guesses == labels)[labels != -100].tolist()
print(f"RESULT {sum(right) / len(right):.4f}")
"""


def test_what_is_pushed_gives_the_figure_of_its_card_in_a_clean_process(copy_paste):
    folder, _, report, hub = copy_paste
    name = "tester/copy-untrained-guide-seed0"
    _, body = check_card(hub.store.files(f"model/{name}")["README.md"].decode())
    done = subprocess.run(
        [sys.executable, "-c", CLEAN, name],
        env=os.environ | hub.environment(folder.parent / "elsewhere"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    assert re.search(r"^\| accuracy +\| (\S+) +\|$", body, re.MULTILINE)[1] == done.stdout.split()[-1]
    assert re.search(r"^\| untrained guide +\| 0 ", body, re.MULTILINE)  # the card with the runs it is compared with
    assert "--hub_model_id tester/copy" in body.replace(" \\\n   ", "")
    assert hub.token not in body
    assert "hub_token" not in report["command"]
    assert {key for key in hub.store.repos if "alone" in key or "itself" in key} == set()
    titles = [commit["title"] for commit in hub.store.repos[f"model/{name}"]["log"]]
    assert titles[-1] == "End of training"  # with the card, which is committed once
    assert all(title.startswith("Training in progress") for title in titles[1:-1]), titles


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"HF_TOKEN": "hf_wrong"}, "error: The token may not write to tester/copy-untrained-guide-seed0 "),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "error: The Hub does not answer as expected for tester/copy-"),
    ],
)
def test_a_hub_that_takes_no_push_is_found_before_the_first_run(wrong, words, tmp_path):
    with Hub(tmp_path / "hub") as hub:
        environment = os.environ | hub.environment(tmp_path / "home") | wrong
        flags = RECIPE.flags(tmp_path / "out", push_to_hub=True, hub_model_id="tester/copy")
        command = [sys.executable, str(RECIPE.path), *flags]
        with on_one_cpu():
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        printed = done.stdout + done.stderr
    assert done.returncode != 0
    assert re.search(words, printed, re.MULTILINE), printed[-3000:]
    assert "Nothing was trained: " in printed
    assert not (tmp_path / "out" / "seed-0").exists()


def test_guided_runs_log_the_similarity_of_every_pair_at_every_logging_step(copy_paste):
    for run in copy_paste[2]["runs"]:
        pairs = {f"hidden_states.{i}~hidden_states.{i}" for i in (1, 2, 3, 4)} if "_guide" in run["run"] else None
        assert (pairs is None) == (run["similarity"] == []) == (run["guide"] is None)
        if pairs:
            assert [set(point) - {"step"} for point in run["similarity"]] == [pairs] * TINY["max_steps"]


def test_the_trained_guide_is_the_network_of_the_reference_run(copy_paste):
    from safetensors.torch import load_file

    from hf_guidance.guide.identity import fingerprint
    from hf_guidance.guide.loading import load_guide

    folder, _, report, _ = copy_paste
    trained = next(run for run in report["runs"] if run["run"] == "trained_guide")
    assert trained["guide"]["fingerprint"] == fingerprint(load_guide(folder / "seed-0" / "guide_itself"))
    assert load_file(folder / "seed-0" / "guide_itself" / "model.safetensors")


def test_a_finished_job_is_read_not_run_again_and_other_settings_are_refused(copy_paste, monkeypatch, capsys):
    folder, _, before, _ = copy_paste
    result = folder / "seed-0" / "alone" / "result.json"
    written = result.stat().st_mtime_ns
    assert run_here(monkeypatch, folder)["runs"] == before["runs"]
    assert result.stat().st_mtime_ns == written
    printed = capsys.readouterr().out
    assert "all of these 4 runs are done already" in printed
    assert "runs done" not in printed
    with pytest.raises(ValueError, match=r"a run with other settings: learning_rate was .*, is 0\.5\. Give another"):
        run_here(monkeypatch, folder, learning_rate=0.5)


def test_ctrl_c_leaves_what_was_done_and_the_same_command_goes_on_to_the_same_result(copy_paste, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    process = launch(folder)
    deadline = time.monotonic() + 120
    while not list(folder.glob("seed-0/guide_itself/checkpoint-2/trainer_state.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Rerun the same command to resume." in printed
    assert not (folder / "results.json").exists()
    with pytest.raises(ValueError, match=r"a run with other settings: weight_decay was 0\.0, is 0\.1\. Give another"):
        run_here(monkeypatch, folder, weight_decay=0.1)
    resumed = run_here(monkeypatch, folder)
    for now, unbroken in zip(resumed["runs"], copy_paste[2]["runs"], strict=True):
        assert (now["run"], now["test"]["loss"], now["similarity"]) == (
            unbroken["run"],
            unbroken["test"]["loss"],
            unbroken["similarity"],
        )


def test_a_run_whose_result_is_gone_goes_on_from_its_last_step_to_the_same_result(copy_paste, tmp_path, monkeypatch):
    folder, names = tmp_path / "out", ("alone", "untrained_guide")
    shutil.copytree(copy_paste[0], folder)
    for name in names:
        (folder / "seed-0" / name / "result.json").unlink()
    resumed = {run["run"]: run for run in run_here(monkeypatch, folder)["runs"]}
    for unbroken in copy_paste[2]["runs"]:
        now = resumed[unbroken["run"]]
        for kept in ("steps", "validation", "training", "similarity"):
            assert now[kept] == unbroken[kept], (unbroken["run"], kept)
        assert now["test"]["loss"] == unbroken["test"]["loss"]


def test_a_guide_trained_anew_is_not_mixed_with_what_the_old_one_guided(copy_paste, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    shutil.copytree(copy_paste[0], folder)
    shutil.rmtree(folder / "seed-0" / "guide_itself")
    with pytest.raises(ValueError, match=r"trained_guide was guided by GPT2Model .* this trainer's guide is GPT2Model"):
        run_here(monkeypatch, folder, guide_max_steps=3)


def test_other_text_is_other_data(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"the quick brown {name} jumps over the lazy dog\n" * 3000)
    options = {"task": "language_modeling", "runs": ["alone"], **TWO_STEPS}
    run_here(monkeypatch, tmp_path / "out", text_files=[tmp_path / "a"], **options)
    with pytest.raises(ValueError, match=r"other settings: data\.\S+ was .*, is "):
        run_here(monkeypatch, tmp_path / "out", text_files=[tmp_path / "b"], **options)
    moved = tmp_path / "elsewhere" / "a"
    moved.parent.mkdir()
    os.rename(tmp_path / "a", moved)
    report = run_here(monkeypatch, tmp_path / "out", text_files=[moved], **options)  # read, not run again
    assert str(tmp_path) not in json.dumps(report["runs"])


def test_a_text_that_make_downloads_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--text_files outputs/shakespeare\.txt is not there: `make shakespeare` "):
        run_here(monkeypatch, tmp_path / "out", claim="language_modeling")


@trains_parity
def test_parity_guides_the_transformer_by_the_rnn(tmp_path, monkeypatch):
    report = run_here(monkeypatch, tmp_path / "out", task="parity", seeds=[0, 1], bf16=True, **TWO_STEPS)
    assert [(run["run"], run["seed"]) for run in report["runs"]] == [(name, seed) for seed in (0, 1) for name in RUNS]
    by_name = {run["run"]: run["target"] for run in report["runs"]}
    assert by_name["alone"] == "ModernBertForSequenceClassification"
    assert by_name["guide_itself"] == "RNNForSequenceClassification"
    assert [row["validation"][1] is not None for row in report["table"]] == [True] * 4


@pytest.mark.parametrize("task", ["copy_paste", pytest.param("parity", marks=trains_parity)])
def test_other_rows_and_distillation_stand_beside_guidance_on_text(task, tmp_path, monkeypatch):
    runs = ["alone", "guide_itself", "shuffled_guide", "distillation", "untrained_distillation"]
    report = run_here(monkeypatch, tmp_path / "out", task=task, runs=runs, per_device_train_batch_size=128, **TWO_STEPS)
    by_name = {run["run"]: run for run in report["runs"]}
    assert list(by_name) == runs
    assert by_name["shuffled_guide"]["settings"]["guidance"]["guide_input"] == "shuffled"
    assert by_name["distillation"]["guide"] is None
    losses = [by_name[name]["training"][-1]["loss"] for name in ("alone", "distillation", "untrained_distillation")]
    assert len(set(losses)) == 3


def test_language_modelling_on_local_text_with_search_and_longer_baseline(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 3000)
    rates = [1e-4, 1e-3, 1e-2]
    report = run_here(
        monkeypatch,
        tmp_path / "out",
        task="language_modeling",
        text_files=[text],
        learning_rates=rates,
        search_seeds=[7],
        longer_baseline=True,
        equal_time_baseline=True,
        runs=["alone", "untrained_guide"],
        **TWO_STEPS,
    )
    search = {run["run"]: run["validation"] for run in report["learning_rate_search"]}
    assert list(search) == [f"alone-lr{rate:g}" for rate in rates]
    best = min(search, key=search.get)
    assert {f"alone-lr{run['settings']['learning_rate']:g}" for run in report["runs"]} == {best}
    assert {run["seed"] for run in report["learning_rate_search"]} == {7}
    rows = [row["run"] for row in report["table"]]
    assert rows[:4] == ["alone", "alone, twice the steps", "alone, equal time", "untrained_guide"]
    assert rows[4:] == ["alone_equal_time"]
    assert [(found["run"], found["baseline"], found["unit"]) for found in report["differences"]] == [
        ("untrained_guide", "alone", "%"),
        ("untrained_guide", "alone_equal_time", "%"),
    ]
    assert {"perplexity", "word_perplexity"} <= set(report["runs"][0]["test"])


def test_a_claim_on_text_stops_its_guidance_and_has_a_baseline_of_equal_time(tmp_path, monkeypatch, capsys):
    tiny = {**TWO_STEPS, "claim": "copy_paste", "seeds": [10], "learning_rates": [1e-3], "search_seeds": [100]}
    report = run_here(monkeypatch, tmp_path / "out", **tiny)
    names = ["alone", "untrained_guide", "untrained_guide_stopped", "alone_equal_time"]
    assert [run["run"] for run in report["runs"]] == names
    settings = {run["run"]: run["settings"] for run in report["runs"]}
    assert settings["untrained_guide_stopped"]["guidance"]["guidance_stop_step"] == 1
    assert settings["untrained_guide"]["guidance"]["guidance_stop_step"] is None
    assert settings["alone_equal_time"]["max_steps"] >= 2
    assert "--claim copy_paste: --seeds 10 11 12 13 14" in capsys.readouterr().out
    with pytest.raises(ValueError, match="choose from 1 to 1"):
        run_here(monkeypatch, tmp_path / "other", **tiny, stop_step=5)


def test_two_processes_end_well_and_agree_on_one_table(tmp_path):
    folder = tmp_path / "out"
    process = launch(folder, "--config_file", str(CONFIGS / "cpu.yaml"), runs=["alone", "untrained_guide"], **TWO_STEPS)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed[-3000:]
    report = json.loads((folder / "results.json").read_text())
    assert report["environment"]["processes"] == 2, printed[-3000:]
    assert printed.count("| untrained guide ") == printed.count("1 of 2 runs done, about ") == 1
    assert [run["settings"]["world_size"] for run in report["runs"]] == [2, 2]


def test_help_describes_the_flags_of_all_three_dataclasses(monkeypatch, capsys):
    printed = ""
    for flag in ("--help", "--help_guidance", "--help_training"):
        monkeypatch.setattr(sys, "argv", [str(RECIPE.path), "--task", "parity", flag])
        with pytest.raises(SystemExit):
            runpy.run_path(str(RECIPE.path), run_name="__main__")
        printed += " ".join(capsys.readouterr().out.split())
    for words in ("--longer_baseline", "--gradient_accumulation_steps", "--guidance_stop_step", "(default: 512)"):
        assert words in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "copypaste"}, "--task copypaste: possible are copy_paste, parity, language_modeling"),
        ({"preset": "large"}, "--preset large: possible are small, paper"),
        ({"runs": ["guided"]}, "--runs guided: possible are alone, untrained_guide, trained_guide, guide_itself"),
        ({"seed": 7}, "--seed: use --seeds and --max_steps instead; rerun the same command"),
        ({"longer_baseline": True}, "train the run 'alone' for longer, but --runs does not name it"),
        ({"task": "language_modeling", "text_files": ["/nowhere.txt"]}, "/nowhere.txt"),
        ({"measure": "cka"}, "Unknown measure 'cka'; possible are linear_cka"),
        ({"similarity_batch": "accumulated"}, "gradient_accumulation_steps is 1"),
        (
            {"per_device_train_batch_size": 2, "sample_axis": "sequence", "measure": "linear_cka"},
            "is 2, but linear_cka needs at least 3 samples a batch",
        ),
        ({"guide_layers": ["h.14"]}, "guide layer 'h.14' not found; the guide has .*4 GPT2Block"),
    ],
)
def test_bad_flags_are_named_before_any_training(options, words, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=words):
        run_here(monkeypatch, tmp_path / "out", **{"runs": ["untrained_guide"], **options})
    assert not list(tmp_path.glob("out/seed-*"))
