"""A user's own trainer alone, guided and as controls: ten lines, resumed, and in numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import gpt2, llama, token_rows
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from hf_guidance import GuidanceConfig, GuidanceTrainer, load_guide
from hf_guidance.experiments import MatchedRun, compare_runs
from hf_guidance.experiments.controls import CONTROLS
from hf_guidance.targets import RNNConfig, RNNForCausalLM

SHORT = {"per_device_train_batch_size": 8, "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
SHORT |= {"use_cpu": True, "save_strategy": "no"}
Make = Callable[[MatchedRun], Trainer]


def maker(seen: list[MatchedRun], callbacks: Callable[[], list[Any]] = list, **changes: Any) -> Make:
    """A function of a user, which also notes for which runs it was called."""

    def make_trainer(run: MatchedRun) -> Trainer:
        seen.append(run)
        settings = {"max_steps": run.max_steps or 3, "seed": run.seed, **SHORT, **changes}
        args = TrainingArguments(settings.pop("output_dir", run.output_dir), **settings)
        own: Any = {"train_dataset": token_rows(16), "eval_dataset": token_rows(8, seed=1), "callbacks": callbacks()}
        guidance = run.guidance(GuidanceConfig(sample_axis="token"))
        torch.rand(1)
        return GuidanceTrainer(gpt2(run.seed), args, **own, guide=llama() if run.guided else None, guidance=guidance)

    return make_trainer


def test_ten_lines_of_a_user_tell_whether_guidance_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, others = token_rows(32), token_rows(16, seed=1)
    guide = load_guide(llama().config, seed=0)

    def make_trainer(run: MatchedRun) -> Trainer:
        target = RNNForCausalLM(RNNConfig(vocab_size=17, hidden_size=8, num_hidden_layers=2))
        args = TrainingArguments(run.output_dir, seed=run.seed, max_steps=run.max_steps or 4, report_to="none")
        own = {"guide": guide if run.guided else None, "guidance": run.guidance(GuidanceConfig(sample_axis="token"))}
        return GuidanceTrainer(target, args, train_dataset=rows, eval_dataset=others, **own)

    found = compare_runs(make_trainer, seeds=[0, 1, 2], folder=tmp_path / "out")
    print(found)

    assert "gain of guided over alone, equal steps, validation: " in capsys.readouterr().out
    assert [row["run"] for row in found.table] == ["alone", "guided", "alone_equal_time"]
    equal_steps, equal_time = found.differences
    assert (equal_steps["unit"], list(equal_steps["values"])) == ("%", [0, 1, 2])
    assert equal_steps["interval"] is not None
    low, high = equal_steps["interval"]
    assert low <= equal_steps["mean"] <= high
    assert equal_time["baseline"] == "alone_equal_time"
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["run"] for run in saved["runs"]] == 3 * ["alone", "guided"] + 3 * ["alone_equal_time"]
    assert (tmp_path / "out" / "results.md").read_text() == f"{found}\n"
    assert "test" not in str(found)
    assert (tmp_path / "out" / "comparison.png").is_file()


def test_the_runs_start_from_the_same_weights_and_the_longer_one_has_its_time(tmp_path: Path) -> None:
    seen: list[MatchedRun] = []
    found = compare_runs(maker(seen), [5], ["noise_guide", "shuffled_guide"], tmp_path)
    rehearsed, trained = seen[:5], seen[5:]
    assert [run.name for run in rehearsed] == [run.name for run in trained]
    assert [(run.name, run.guided, run.control) for run in trained] == [
        ("alone", False, None),
        ("guided", True, None),
        ("noise_guide", True, "noise_guide"),
        ("shuffled_guide", True, "shuffled_guide"),
        ("alone_equal_time", False, None),
    ]
    alone, guided, noise, shuffled, longer = found.runs
    assert alone["training"][0]["loss"] == pytest.approx(guided["training"][0]["loss"], abs=1e-6)
    assert (noise["settings"]["guidance"]["guide_input"], alone["settings"]["guidance"]) == ("noise", None)
    assert shuffled["settings"]["guidance"]["guide_input"] == "shuffled"
    assert longer["steps"] == seen[-1].max_steps
    assert longer["steps"] == math.ceil(max(1.0, 1.1 * guided["seconds"] / alone["seconds"]) * 3)
    assert found.differences[0]["interval"] is None  # of one seed


def test_finished_runs_are_read_again_and_a_stopped_one_resumes(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        """Stops the process in the second step of the second run."""

        def on_step_begin(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
            if Path(args.output_dir).name == "guided" and state.global_step == 2:
                raise KeyboardInterrupt

    class Note(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
            steps.append((Path(args.output_dir).name, state.global_step))

    steps: list[tuple[str, int]] = []
    saving = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        compare_runs(maker([], lambda: [Stop()], **saving), [0], folder=tmp_path / "stopped", equal_time=False)
    make = maker([], lambda: [Note()], **saving)
    found = compare_runs(make, [0], folder=tmp_path / "stopped", equal_time=False)
    assert steps == [("guided", 2)]
    whole = compare_runs(maker([], **saving), [0], folder=tmp_path / "whole", equal_time=False)
    assert [run["test"]["loss"] for run in found.runs] == [run["test"]["loss"] for run in whole.runs]
    compare_runs(make, [0], folder=tmp_path / "stopped", equal_time=False)
    assert len(steps) == 1


def test_other_settings_are_refused(tmp_path: Path) -> None:
    compare_runs(maker([]), [0], folder=tmp_path, equal_time=False)
    with pytest.raises(
        ValueError, match=r"holds a run with other settings: learning_rate was 5e-05, is 0\.1\. Give another folder"
    ):
        compare_runs(maker([], learning_rate=0.1), [0], folder=tmp_path, equal_time=False)


def test_gains_are_points_of_a_fraction(tmp_path: Path) -> None:
    def make_trainer(run: MatchedRun) -> Trainer:
        trainer = maker([])(run)
        trainer.compute_metrics = lambda _: {"accuracy": 0.75 if run.guided else 0.5}
        return trainer

    words = {"metric": "accuracy", "equal_time": False}
    found = compare_runs(make_trainer, [0, 1], folder=tmp_path, percent=True, **words)
    assert found.differences[0]["values"] == {0: 25.0, 1: 25.0}
    assert "+25.0 points" in str(found)


def test_test_data_of_its_own_decide_if_there_are_any(tmp_path: Path) -> None:
    rows = token_rows(8, seed=2)
    found = compare_runs(maker([]), [0], folder=tmp_path, equal_time=False, test_dataset=rows)
    alone = found.runs[0]
    assert alone["test"]["loss"] != alone["validation"]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    trained = GPT2LMHeadModel.from_pretrained(tmp_path / "seed-0" / "alone")
    assert alone["test"]["loss"] == pytest.approx(trained(**batch).loss.item(), abs=1e-5)
    assert "| test loss" in str(found)
    assert "gain of guided over alone, equal steps, test: " in str(found)
    with pytest.raises(ValueError, match=r"data\.test_rows was 8, is None"):
        compare_runs(maker([]), [0], folder=tmp_path, equal_time=False)


def test_what_cannot_be_compared_is_told_before_or_with_its_remedy(tmp_path: Path) -> None:
    def other(change: Callable[[MatchedRun, Any], Any]) -> Make:
        return lambda run: change(run, maker([])(run))

    def without(run: MatchedRun, trainer: Any) -> Any:
        trainer.eval_dataset = None
        return trainer

    for make, options, said in (
        (maker([]), {"seeds": []}, r"seeds are \[\]; expected a list of whole numbers"),
        (maker([]), {"seeds": 3}, "seeds are 3; expected a list of whole numbers"),
        (maker([]), {"seeds": [0.5]}, "expected a list of whole numbers"),
        (maker([]), {"seeds": [-1]}, "from 0 on"),
        (maker([]), {"controls": "noise"}, "controls is the string 'noise'"),
        (3, {}, "make_trainer is a int; expected a function of a run"),
        (maker([]), {"test_dataset": []}, "test_dataset has no rows"),
        (maker([]), {"metric": "eval_loss"}, "expected its name without eval_: 'loss'"),
        (maker([], max_steps=3), {"equal_time": True}, "pass max_steps=run.max_steps"),
        (maker([]), {"seeds": [1, 1]}, "each once"),
        (maker([]), {"controls": ["none"]}, f"names? 'none'; possible are {', '.join(CONTROLS)}"),
        (maker([]), {"controls": ["noise_guide", "noise_guide"]}, "name each once"),
        (maker([], seed=3), {}, "with seed=3; expected 0: pass seed=run.seed to TrainingArguments"),
        (maker([], output_dir=str(tmp_path)), {}, "pass output_dir=run.output_dir"),
        (other(without), {}, "without eval_dataset, by which runs are compared"),
        (other(lambda run, trainer: trainer.model), {}, "returned a GPT2LMHeadModel; expected a Trainer"),
        (maker([]), {"metric": "accuracy"}, "metric is 'accuracy', but the evaluation gives loss"),
    ):
        given: Any = {"seeds": [0], "folder": tmp_path / "out", "equal_time": False, **options}
        with pytest.raises(ValueError, match=said):
            compare_runs(make, **given)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"folder .* cannot be written"):
        compare_runs(maker([]), [0], folder=tmp_path / "file" / "out")
