"""A run's settings keep runs apart, and its record has what came of it."""

import json
from types import SimpleNamespace

import pytest
from builders import arguments, gpt2, llama, token_rows
from transformers import default_data_collator

from hf_guidance import GuidanceConfig, GuidanceTrainer
from hf_guidance.experiments.run import SETTINGS, Run, check_same_settings, first_rows, record_of, settings_of
from hf_guidance.trainer.steps import TrainingClock

DATA = {"task": "copy_paste", "min_length": 8}


@pytest.fixture
def settings(tmp_path):
    def of(guidance=None, data=DATA, **changes):
        return settings_of(gpt2(), arguments(tmp_path, **changes), guidance, data)

    return of


def test_what_weights_and_curves_depend_on_is_in_the_settings_and_nothing_of_places_and_logs(settings):
    found = settings()
    assert (found["learning_rate"], found["network"]["n_embd"], found["data"]) == (1e-2, 8, DATA)
    assert json.loads(json.dumps(found)) == found
    assert settings(seed=8, logging_steps=9, dataloader_num_workers=1, run_name="x") == found
    for change in ({"learning_rate": 0.5}, {"warmup_steps": 1}, {"dataloader_drop_last": True}, {"max_steps": 4}):
        assert settings(**change) != found
    assert found["guidance"] is None
    cached = {"sketch": 4, "sample_id_column": "id"}
    elsewhere = [settings(GuidanceConfig(cache_guide=str(place), **cached)) for place in ("/one/cache", "/two/cache")]
    assert elsewhere[0] == elsewhere[1]


def test_a_setting_that_changed_is_named_with_both_values(tmp_path, settings):
    check_same_settings(tmp_path, settings())  # there is no run yet
    (tmp_path / SETTINGS).write_text(json.dumps(settings(GuidanceConfig(measure="ridge"))))
    check_same_settings(tmp_path, settings(GuidanceConfig(measure="ridge")))
    with pytest.raises(ValueError, match=r"other settings: data\.min_length was 8, is 9\. Give another output_dir"):
        check_same_settings(tmp_path, settings(GuidanceConfig(measure="ridge"), data=DATA | {"min_length": 9}))
    with pytest.raises(ValueError, match=r"guidance\.measure was 'ridge', is 'rsa'"):
        check_same_settings(tmp_path, settings(GuidanceConfig(measure="rsa")))


def test_settings_of_another_version_are_one_short_line(tmp_path, settings):
    (tmp_path / SETTINGS).write_text(json.dumps(settings() | {f"field_{i}": i for i in range(9)}))
    with pytest.raises(ValueError, match="holds a run with another version of hf_guidance or transformers") as raised:
        check_same_settings(tmp_path, settings())
    assert "field_5 was 5, is None and 3 more. Give another output_dir." in str(raised.value)
    check_same_settings(tmp_path, settings(), [f"field_{i}" for i in range(9)])


def test_settings_that_are_damaged_are_named(tmp_path, settings):
    (tmp_path / SETTINGS).write_text('{"learning')
    with pytest.raises(ValueError, match=rf"{SETTINGS} is damaged .*\. Remove {tmp_path} to run it again"):
        check_same_settings(tmp_path, settings())


def test_a_setting_that_did_not_exist_then_had_its_default(tmp_path, settings):
    then = settings(GuidanceConfig())
    del then["guidance"]["guidance_every"]
    (tmp_path / SETTINGS).write_text(json.dumps(then))
    check_same_settings(tmp_path, settings(GuidanceConfig()))
    with pytest.raises(ValueError, match=r"guidance\.guidance_every was 1, is 2"):
        check_same_settings(tmp_path, settings(GuidanceConfig(guidance_every=2)))


def test_the_first_rows_are_a_batch_of_no_more_than_there_are():
    task = SimpleNamespace(eval_dataset=token_rows(3), data_collator=default_data_collator)
    assert first_rows(task, 2)["input_ids"].tolist() == [row["input_ids"].tolist() for row in token_rows(3)[:2]]
    assert len(first_rows(task, 8)["labels"]) == 3


def test_the_record_of_a_run_has_its_curves_its_guide_and_its_test(tmp_path):
    trainer = GuidanceTrainer(
        gpt2(),
        arguments(tmp_path, eval_strategy="steps", eval_steps=2, max_steps=2),
        train_dataset=token_rows(),
        eval_dataset=token_rows(4),
        guide=llama(),
        guidance=GuidanceConfig(sample_axis="token"),
        callbacks=[TrainingClock()],
    )
    trainer.train()
    run = Run("guided", 7, model=gpt2, guide=llama)
    test = {"test_loss": 0.5, "test_runtime": 2.0, "epoch": 1.0}
    record = record_of(run, trainer, {"data": DATA}, test, "loss")
    logs = trainer.state.log_history
    assert (record["run"], record["seed"], record["steps"], record["settings"]) == ("guided", 7, 2, {"data": DATA})
    assert record["validation"] == next(log["eval_loss"] for log in logs if "eval_loss" in log)
    assert [(point["step"], point["seconds"] > 0) for point in record["curve"]] == [(2, True)]
    assert record["test"] == {"loss": 0.5, "runtime": 2.0}
    assert record["guide"]["fingerprint"] == trainer.guide_identity["fingerprint"]
    assert (
        [point["step"] for point in record["training"]] == [point["step"] for point in record["similarity"]] == [1, 2]
    )
    assert (record["target"], record["parameters"]) == ("GPT2LMHeadModel", gpt2().num_parameters())
    assert json.loads(json.dumps(record)) == record
    assert record_of(Run("alone", 7, model=gpt2), trainer, {}, {}, "loss")["guide"] is None
