"""Tables of target, guide and guidance that depend on how a run went."""

import pytest

from hf_guidance import GuidanceConfig
from hf_guidance.card import guidance_sections
from hf_guidance.card.guidance_sections import article, network_name, networks, on_the_hub


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def pairs(*rows, first=1, before_last=2, last=3):
    found = [dict(zip(("target", "guide", "first", "last"), row, strict=True)) for row in rows]
    return {"pairs": {"first": first, "before_last": before_last, "last": last, "rows": found}}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("RNNForCausalLM", "An"), ("FCNModel", "An"), ("T5Model", "A"), ("LlamaModel", "A"), ("AlbertModel", "An")],
)
def test_the_article_is_that_of_the_spoken_name(name, expected):
    assert article(name) == expected


def test_a_guide_behind_the_wrapper_of_timm_is_called_by_its_own_name():
    guide = {"architecture": "TimmWrapperModel", "parameters": 5, "untrained": True, "seed": 0, "timm": "resnet18"}
    target = {"architecture": "FCNModel", "parameters": 3}
    assert (network_name(guide), network_name(target)) == ("resnet18 of timm", "FCNModel")
    assert cells(networks({"target": target, "guide": guide}))[2] == ["architecture", "FCNModel", "resnet18 of timm"]


def test_the_origin_of_weights_is_their_seed_their_commit_or_their_folder():
    sides = [
        ({"untrained": True, "seed": 3}, "random, seed 3"),
        ({"untrained": False, "source": "me/net", "revision": "abc"}, "me/net at abc"),
        ({"untrained": False, "source": "net", "revision": None}, "trained, from a folder called net"),
        ({"untrained": None, "fingerprint": "sha256:1"}, "a module of the user's own"),
        (
            {"own_base": True, "source": "me/net", "revision": "abc"},
            "the target's own without its adapters: me/net at abc",
        ),
        ({"own_base": True, "source": None, "revision": None}, "the target's own without its adapters"),
        ({}, "as the user gave them"),
    ]
    for side, words in sides:
        assert cells(networks({"target": {"architecture": "A", "parameters": 1} | side}))[4][1] == words


def test_a_size_with_two_names_is_told_once():
    target = {"architecture": "A", "parameters": 1, "sizes": {"hidden size": 8, "n embd": 8, "n layer": 2}}
    assert cells(networks({"target": target}))[5] == ["sizes", "hidden size 8, n layer 2"]


def test_a_guide_is_on_the_hub_if_its_commit_is_known():
    assert on_the_hub({"guide": {"source": "me/net", "revision": "abc"}})
    assert not on_the_hub({"guide": {"source": "me/net) [x](y", "revision": "abc"}})
    assert not on_the_hub({"guide": {"source": "me/net", "revision": "abc) x"}})
    assert not on_the_hub({"guide": {"source": "net", "revision": None}})
    assert not on_the_hub({})


def test_settings_that_most_runs_leave_alone_are_shown_where_they_are_not():
    facts = {"guide": {"batch_norm": False}, "guidance": GuidanceConfig().to_dict()}
    assert "sketch" not in guidance_sections.guidance(facts)
    facts["guidance"] |= {"guidance_every": 4, "sketch": 64, "layer_pairs": ["a~b"], "similarity_batch": "global"}
    text = guidance_sections.guidance(facts)
    assert all(words in text for words in ("one optimizer step in 4", "64 numbers", r"a\~b", "all processes"))
    facts["guidance"]["similarity_batch"] = "accumulated"
    assert "all micro-batches of an optimizer step" in guidance_sections.guidance(facts)
    assert guidance_sections.guidance({}) == ""


def test_weights_of_pairs_a_warm_up_and_the_step_where_guidance_stopped_are_shown():
    config = {"layer_pairs": ["h.3~h.1@0.5", "h.2~h.1"], "guidance_reduction": "mean", "guidance_warmup_steps": 5}
    config |= {"guidance_stop_similarity": 0.9, "prealign_steps": 10, "guidance_weight": 2.0}
    facts = {"guide": {"batch_norm": False}, "guidance": GuidanceConfig(**config).to_dict()}
    rows = {row[0]: row[1] for row in cells(guidance_sections.guidance(facts | {"stopped_at": 40}))}
    assert rows["weight"] == "2, on the weighted mean over the pairs"
    assert rows["layers paired"] == r"one by one: h.3\~h.1@<!-- -->0.5, h.2\~h.1"
    begin = "10 steps of pre-alignment, then linear warm-up over 5 steps, then constant, "
    begin += "ending at a mean similarity of 0.9: "
    assert rows["schedule"] == begin + "reached at step 40"
    rows = {row[0]: row[1] for row in cells(guidance_sections.guidance(facts))}
    assert rows["schedule"] == begin + "not reached"


def test_similarities_are_means_over_the_steps_since_the_log_before_and_finite():
    text = guidance_sections.pairs(pairs(("a", "b", 0.25, float("nan")), first=5, before_last=10, last=15))
    assert "mean over steps 1–5" in text
    assert "mean over steps 11–15" in text
    assert "not finite (the run diverged)" in text
    assert guidance_sections.pairs({}) == ""


def test_pairs_are_in_the_order_of_their_numbers():
    text = guidance_sections.pairs(pairs(("h.10", "g", 0.1, 0.2), ("h.9", "g", 0.1, 0.2)))
    assert [row[0] for row in cells(text)[2:]] == ["h.9", "h.10"]


def test_a_pair_whose_layer_was_skipped_in_a_log_has_a_row_all_the_same():
    skipped = pairs(("a", "b", 0.25, None), ("c", "d", None, 0.75))
    rows = cells(guidance_sections.pairs(skipped))
    assert ["a", "b", "0.250", "–"] in rows
    assert ["c", "d", "–", "0.750"] in rows
    assert guidance_sections.a_layer_was_skipped(skipped)
    assert not guidance_sections.a_layer_was_skipped(pairs(("a", "b", 0.25, 0.5)))
    assert not guidance_sections.a_layer_was_skipped({})
