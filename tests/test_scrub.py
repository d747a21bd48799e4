"""What is cut out of commands, cards and arguments before they leave the machine, and what is not."""

import dataclasses
from pathlib import Path

import pytest

from hf_guidance import scrub
from hf_guidance.scrub import scrub_arguments, scrub_command, without_tokens


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


@pytest.mark.parametrize(
    "flag", ["--hub-token", "--hub_token", "--hub_tok", "--wandb_api_key", "--wandb-api-key", "--client_secret"]
)
def test_flags_that_hold_a_secret_go_with_it(flag):
    assert without_tokens(["run", flag, "abc", f"{flag}=abc", "--seed", "1"]) == ["run", "--seed", "1"]


def test_flags_of_tokens_that_are_no_secret_stay():
    words = ["run", "--max_tokens", "64", "--bos_token", "B", "--mask-token", "M", "--pad_token=P", "--author", "me"]
    assert scrub_command(words) == " ".join(words)


@pytest.mark.parametrize(
    "word", ["hub_token=abc", "model.api_key=abc", "--password=abc", "--aws_secret_access_key=abc"]
)
def test_a_secret_in_one_word_goes_with_its_name(word):
    assert without_tokens(["run", word, "lr=1"]) == ["run", "lr=1"]


@pytest.mark.parametrize("flag", ["--aws_secret_access_key", "--auth", "--db-password", "--private_key"])
def test_a_secret_after_its_flag_goes_with_it(flag):
    assert without_tokens(["run", flag, "Bearer abc", "--lr", "1"]) == ["run", "--lr", "1"]


def test_this_machine_in_an_address_is_any_machine(monkeypatch):
    monkeypatch.setattr(scrub.platform, "node", lambda: "vm")
    words = ["run", "--uri", "http://vm:5000", "--base=https://vm/x", "--other", "https://vm.org/vm"]
    assert (
        scrub_command(words) == "run --uri http://localhost:5000 --base=https://localhost/x --other https://vm.org/vm"
    )


def test_who_logs_in_is_cut_out_of_an_address():
    assert scrub_command(["run", "--data", "https://me:pw@host.org/x", "me@x.org"]) == (
        "run --data https://host.org/x me@x.org"
    )


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


@pytest.mark.parametrize(
    ("word", "clean"),
    [
        ("-o/home/alice/out", "-oout"),
        ("--out:/home/alice/out", "--out:out"),
        ("--files=/home/alice/a,/home/alice/b", "--files=a,b"),
        ("/home/alice", "."),
        ("--lr=0.1", "--lr=0.1"),
        ("alicebox", "localhost"),
        ("--addr=alicebox:29500", "--addr=localhost:29500"),
        ("https://alice:pa@ss@hub.org/x", "https://hub.org/x"),
        ("--hub=https://hub.org/x?token=s3cr3t&n=1", "'--hub=https://hub.org/x?token=<token>&n=1'"),
        ('--config={"hub_token": "s3cr3t", "lr": 1}', """'--config={"hub_token": "<token>", "lr": 1}'"""),
    ],
)
def test_what_is_the_machines_or_secret_within_a_word_is_cut(word, clean, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/alice"))
    monkeypatch.setattr(scrub.platform, "node", lambda: "alicebox")
    assert scrub_command(["t.py", word]) == f"t.py {clean}"


@pytest.mark.parametrize("word", ["+hub_token=s", "++trainer.hub_token=s", "--HUB_TOKEN=s"])
def test_other_spellings_of_a_secrets_flag_go_too(word):
    assert without_tokens(["t.py", word]) == ["t.py"]
