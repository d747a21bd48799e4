"""Sentences and tables of a card that depend on how a run went."""

from types import SimpleNamespace

from hf_guidance import GuidanceConfig
from hf_guidance.card import guidance_sections, result_sections
from hf_guidance.card.facts import task_facts
from hf_guidance.trainer.run_facts import _results, best_step, pairs_facts, timms_name


def test_the_best_weights_have_their_own_values():
    logs = [{"step": 2, "eval_loss": 0.5}, {"step": 4, "eval_loss": 0.7}, {"step": 4, "train_runtime": 1.0}]
    state = SimpleNamespace(log_history=logs, best_model_checkpoint="out/checkpoint-2")
    trainer = SimpleNamespace(state=state, args=SimpleNamespace(load_best_model_at_end=True))
    text = result_sections.results({"results": _results(logs, best_step(trainer))})
    assert "0.5000" in text
    assert "those of step 2, the best" in text
    trainer.args.load_best_model_at_end = False
    assert "0.7000" in result_sections.results({"results": _results(logs, best_step(trainer))})


def test_similarities_are_means_over_the_steps_since_the_log_before_and_finite():
    points = [{"step": 5, "a~b": 0.25}, {"step": 10, "a~b": 0.5}, {"step": 15, "a~b": float("nan")}]
    text = guidance_sections.pairs({"pairs": pairs_facts(points)})
    assert "mean over steps 1–5" in text
    assert "mean over steps 11–15" in text
    assert "not finite (the run diverged)" in text


def test_a_pair_whose_layer_was_skipped_in_a_log_has_a_row_all_the_same():
    points = [{"step": 1, "a~b": 0.25}, {"step": 2, "a~b": 0.5, "c~d": 0.625}, {"step": 3, "c~d": 0.75}]
    text = guidance_sections.pairs({"pairs": pairs_facts(points)})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["a", "b", "0.250", "–"] in rows
    assert ["c", "d", "–", "0.750"] in rows
    assert "LayerDrop skipped" in text
    assert "LayerDrop" not in guidance_sections.pairs({"pairs": pairs_facts(points[:2][1:])})


def test_a_guide_behind_the_wrapper_of_timm_is_called_by_its_own_name():
    guide = {"architecture": "TimmWrapperModel", "parameters": 5, "untrained": True, "seed": 0}
    guide["timm"] = timms_name({"model_type": "timm_wrapper", "architecture": "resnet18"})
    target = {"architecture": "FCNModel", "parameters": 3}
    text = guidance_sections.summary({"target": target, "guide": guide, "training": {"steps": 2}})
    assert "a frozen resnet18 of timm that kept its random weights" in text
    assert "| resnet18 of timm |" in guidance_sections.networks({"target": target, "guide": guide})
    assert timms_name({"model_type": "gpt2", "architecture": "x"}) is None


def test_a_shuffle_buffer_is_a_streams_and_a_guides_images_are_told_where_they_differ():
    data = {"dataset": "digits", "shuffle_buffer": 20, "streaming": False}
    data["target"] = data["guide"] = {"size": 8, "mean": [0.5], "std": [0.5]}
    facts = task_facts("image_classification", "Name the class.", data)
    assert not {"shuffle buffer", "images of the guide"} & set(facts)
    data |= {"streaming": True, "guide": data["target"] | {"size": 32}}
    facts = task_facts("image_classification", "Name the class.", data)
    assert (facts["shuffle buffer"], facts["images of the guide"]) == (20, "32 × 32 pixels")


def test_settings_that_most_runs_leave_alone_are_shown_where_they_are_not():
    facts = {"guide": {"batch_norm": False}, "guidance": GuidanceConfig().to_dict()}
    assert "sketch" not in guidance_sections.guidance(facts)
    facts["guidance"] |= {"guidance_every": 4, "sketch": 64, "layer_pairs": ["a~b"], "similarity_batch": "global"}
    text = guidance_sections.guidance(facts)
    assert all(words in text for words in ("one optimizer step in 4", "64 numbers", r"a\~b", "all processes"))
    facts["guidance"]["similarity_batch"] = "accumulated"
    assert "all micro-batches of an optimizer step" in guidance_sections.guidance(facts)


def test_only_an_untrained_target_has_learnt_from_nothing_else():
    data = {"data": {"rows": 3}}
    assert "from nothing else" in result_sections.limitations({"target": {"untrained": True}} | data)
    assert "from nothing else" not in result_sections.limitations({"target": {"source": "me/net"}} | data)
    assert "not named here" in result_sections.limitations({"target": {"untrained": True}})
