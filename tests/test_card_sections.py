"""Sentences and tables of a card that depend on how a run went."""

from types import SimpleNamespace

from hf_guidance import GuidanceConfig, card_guidance, card_results
from hf_guidance.card_facts import _results, best_step, pairs_facts


def test_the_best_weights_have_their_own_values():
    logs = [{"step": 2, "eval_loss": 0.5}, {"step": 4, "eval_loss": 0.7}, {"step": 4, "train_runtime": 1.0}]
    state = SimpleNamespace(log_history=logs, best_model_checkpoint="out/checkpoint-2")
    trainer = SimpleNamespace(state=state, args=SimpleNamespace(load_best_model_at_end=True))
    text = card_results.results({"results": _results(logs, best_step(trainer))})
    assert "0.5000" in text
    assert "those of step 2, the best" in text
    trainer.args.load_best_model_at_end = False
    assert "0.7000" in card_results.results({"results": _results(logs, best_step(trainer))})


def test_similarities_are_means_over_the_steps_since_the_log_before_and_finite():
    points = [{"step": 5, "a~b": 0.25}, {"step": 10, "a~b": 0.5}, {"step": 15, "a~b": float("nan")}]
    text = card_guidance.pairs({"pairs": pairs_facts(points)})
    assert "mean over steps 1–5" in text
    assert "mean over steps 11–15" in text
    assert "not finite (the run diverged)" in text


def test_settings_that_most_runs_leave_alone_are_shown_where_they_are_not():
    facts = {"guide": {"batch_norm": False}, "guidance": GuidanceConfig().to_dict()}
    assert "sketch" not in card_guidance.guidance(facts)
    facts["guidance"] |= {"guidance_every": 4, "sketch": 64, "layer_pairs": ["a~b"], "similarity_batch": "global"}
    text = card_guidance.guidance(facts)
    assert all(words in text for words in ("one optimizer step in 4", "64 numbers", r"a\~b", "all processes"))


def test_only_an_untrained_target_has_learnt_from_nothing_else():
    data = {"data": {"rows": 3}}
    assert "from nothing else" in card_results.limitations({"target": {"untrained": True}} | data)
    assert "from nothing else" not in card_results.limitations({"target": {"source": "me/net"}} | data)
    assert "not named here" in card_results.limitations({"target": {"untrained": True}})
