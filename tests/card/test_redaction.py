"""Redaction of cards and arguments before they leave the machine: what goes, and what stays."""

import dataclasses
from pathlib import Path

import pytest

from hf_guidance.card import redaction as scrub
from hf_guidance.card.redaction import scrub_arguments


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("data:/home/alice/x.txt", "data:x.txt"),
        ("[/home/alice/x.txt", "[x.txt"),
        ("-/home/alice/x.txt", "-x.txt"),
        ("~alice/x", "x"),
        ("../../home/alice/x", "x"),
        (r"C:\Users\Alice\x", "x"),
        ("/home/alice/my data/x", "x"),
        ("hf_oauth_" + "a" * 24, "<token>"),
        ("api_org_" + "a" * 24, "<token>"),
        ("python -m hf_guidance.recipe_cards_of_all_runs", "python -m hf_guidance.recipe_cards_of_all_runs"),
        ("https://a/b/c a/b </s> and/or 1 / 2", "https://a/b/c a/b </s> and/or 1 / 2"),
    ],
)
def test_paths_and_tokens_are_cut_and_links_are_not(text, clean):
    assert scrub.scrub(text) == clean


def test_the_names_of_user_and_machine_are_cut(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/alice"))
    monkeypatch.setattr(scrub.platform, "node", lambda: "bigbox-7")
    assert scrub.scrub("alice on bigbox-7 in /home/alice, not malice") == "… on … in …, not malice"


def test_an_id_or_a_setting_that_is_somebodys_name_too_stays(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ridge"))
    facts = {"measure": "ridge", "repository": "ridge/copies", "url": "https://huggingface.co/ridge/copies"}
    assert scrub.scrub(facts) == facts


def test_arguments_are_scrubbed_in_their_dicts_and_lists_too():
    @dataclasses.dataclass
    class Arguments:
        settings: dict
        hub_token: str

    clean = scrub_arguments(Arguments({"token": "abc", "paths": ["/a/b/c"], "n": 3}, "abc"))
    assert clean == Arguments({"token": None, "paths": ["c"], "n": 3}, None)
