"""Facts of a run on its card: what the card says of any GuidanceTrainer, and what it leaves out."""

import re
import shlex
from types import SimpleNamespace

import pytest
from builders import arguments, gpt2, llama, token_rows
from cards import check_card
from transformers import TrainerCallback

import hf_guidance.trainer.card_mixin
import hf_guidance.trainer.run_facts
from hf_guidance import GuidanceConfig, GuidanceTrainer
from hf_guidance.trainer.run_facts import _results, best_step, pairs_facts, stopped_at, timms_name


class CodeCarbonCallback(TrainerCallback):
    """Named as transformers' own, which needs codecarbon; leaves the rows that codecarbon writes."""

    def on_train_end(self, args, state, control, **kwargs):
        with open(f"{args.output_dir}/emissions.csv", "w", encoding="utf-8") as file:
            file.write(
                "timestamp,run_id,duration,emissions,country_name\n1,a,3,0.5,Elsewhere\n2,b,3,0.00125,Elsewhere\n"
            )


def trained(folder, *callbacks, **options):
    own = GuidanceTrainer(
        gpt2(),
        options.pop("args", arguments(folder / "out")),
        train_dataset=token_rows(),
        guide=llama(),
        callbacks=list(callbacks),
        **{"eval_dataset": token_rows(), "guidance": GuidanceConfig(sample_axis="token")} | options,
    )
    own.train()
    return own


def test_emissions_are_those_that_codecarbon_measured_in_this_run(tmp_path):
    own = trained(tmp_path, CodeCarbonCallback())
    own.evaluate()
    own.create_model_card(license="mit", language="en", tags=["a", "b"], dataset_tags="me/rows", dataset="My `rows`")
    metadata, body = check_card((tmp_path / "out" / "README.md").read_text())
    assert metadata["co2_eq_emissions"] == {"emissions": 1.25, "source": "codecarbon"}
    assert re.search(r"^\| emissions, by codecarbon +\| 1\.25 g CO₂eq +\|$", body, re.MULTILINE)
    assert "Elsewhere" not in body
    assert metadata["datasets"] == ["me/rows"]
    assert metadata["tags"] == ["hf_guidance", "guidance", "arxiv:2410.20035", "text-generation", "a", "b"]
    assert r"steps on My \`rows\` and [guided](" in body
    loss = own.state.log_history[-1]["eval_loss"]
    assert metadata["model-index"][0]["results"][0]["metrics"] == [{"type": "loss", "value": loss, "name": "loss"}]
    assert re.search(rf"^\| loss +\| {loss:.4f} +\|$", body, re.MULTILINE)


def test_values_of_several_sets_to_validate_with_are_all_there_and_none_of_their_speeds(tmp_path):
    rows = token_rows()
    own = trained(tmp_path, eval_dataset={"near": rows[:4], "far": rows[4:8]})
    own.evaluate()
    own.create_model_card(dataset="rows")
    metadata, body = check_card((tmp_path / "out" / "README.md").read_text())
    assert [m["type"] for m in metadata["model-index"][0]["results"][0]["metrics"]] == ["near_loss", "far_loss"]
    assert "per second" not in body


@pytest.mark.parametrize(
    ("guidance", "words"),
    [
        ({"guidance_stop_step": 1}, "a step, guided or not, on average"),
        ({"guidance_every": 2}, "a step, guided or not, on average"),
        ({"guidance_stop_step": 99}, "a step with guidance"),
        ({"guidance_stop_similarity": 1.0}, "a step with guidance"),
        ({"guidance_weight": 0.0}, "a step"),
    ],
)
def test_the_time_of_a_step_is_called_what_it_is(guidance, words, tmp_path):
    own = trained(tmp_path, guidance=GuidanceConfig(sample_axis="token", **guidance))
    own.create_model_card()
    _, body = check_card((tmp_path / "out" / "README.md").read_text())
    assert re.search(rf"^\| {words} +\| [\d.e-]+ s of CPU time +\|$", body, re.MULTILINE)
    assert ("and [guided](" in body) == ("weight" not in str(guidance))
    assert "in training, and similarity of every pair" in body  # as nothing was validated


def test_the_card_says_at_which_step_guidance_stopped(tmp_path):
    guidance = GuidanceConfig(sample_axis="token", guidance_stop_similarity=0.001, measure="linear_cka")
    own = trained(tmp_path, guidance=guidance, args=arguments(tmp_path / "out", max_steps=22))
    assert stopped_at(own) == 20
    own.create_model_card()
    _, body = check_card((tmp_path / "out" / "README.md").read_text())
    assert "constant, ending at a mean similarity of 0.001: reached at step 20" in body
    assert "a step, guided or not, on average" in body


def test_similarities_on_validation_data_are_no_results_of_the_task(tmp_path):
    own = trained(tmp_path, guidance=GuidanceConfig(sample_axis="token", eval_similarity=True))
    assert own.evaluate()["eval_guidance/similarity"]
    own.create_model_card(dataset="rows")
    metadata, _ = check_card((tmp_path / "out" / "README.md").read_text())
    assert [m["type"] for m in metadata["model-index"][0]["results"][0]["metrics"]] == ["loss"]


def test_a_users_command_is_no_prose(tmp_path, monkeypatch):
    monkeypatch.setenv("USER", "tester")
    command = "python train.py --hub_model_id tester/net --measure ridge"
    monkeypatch.setattr(hf_guidance.trainer.run_facts, "command_line", lambda: shlex.split(command))
    own = trained(tmp_path)
    own.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert command in card
    assert "are left out" not in card


def test_the_best_weights_have_their_own_values():
    logs = [{"step": 2, "eval_loss": 0.5}, {"step": 4, "eval_loss": 0.7}, {"step": 4, "train_runtime": 1.0}]
    state = SimpleNamespace(log_history=logs, best_model_checkpoint="out/checkpoint-2")
    trainer = SimpleNamespace(state=state, args=SimpleNamespace(load_best_model_at_end=True))
    assert _results(logs, best_step(trainer)) == {"split": "validation", "values": {"loss": 0.5}, "best_step": 2}
    trainer.args.load_best_model_at_end = False
    assert _results(logs, best_step(trainer)) == {"split": "validation", "values": {"loss": 0.7}}


def test_a_pair_has_its_first_and_last_similarity_and_none_where_a_log_has_none():
    points = [{"step": 1, "a~b": 0.25}, {"step": 2, "a~b": 0.5, "c~d": 0.625}, {"step": 3, "c~d": 0.75}]
    facts = pairs_facts(points)
    assert (facts["first"], facts["before_last"], facts["last"]) == (1, 2, 3)
    assert [tuple(row.values()) for row in facts["rows"]] == [
        ("a", "b", 0.25, None, None),
        ("c", "d", None, 0.75, None),
    ]
    beside = pairs_facts(points, [{"step": 1, "a~b": 0.1}, {"step": 3, "a~b": 0.2}])
    assert [row["debiased"] for row in beside["rows"]] == [0.2, None]
    assert pairs_facts([]) is None


def test_only_the_wrapper_of_timm_has_another_name_inside():
    assert timms_name({"model_type": "timm_wrapper", "architecture": "resnet18"}) == "resnet18"
    assert timms_name({"model_type": "gpt2", "architecture": "x"}) is None
