"""Redaction of the settings that are pushed with a model: what goes, and what stays."""

import json
import os
from pathlib import Path

import pytest

from hf_guidance.card.settings_redaction import scrub_settings

HF = "hf_" + 34 * "a"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/alice"))


def cleaned(folder, content, name="adapter_config.json"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    scrub_settings(folder, folder / "out")
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("value", "clean"),
    [
        ("/home/alice/models/llama", "llama"),
        ("/data/my models/llama 3/", "llama 3"),
        ("~/llama", "llama"),
        ("~alice/llama", "llama"),
        ("file:///data/llama", "llama"),
        ("C:\\Users\\Alice\\llama", "llama"),
        ("C:/Users/Alice/llama", "llama"),
        ("\\\\server\\share\\llama", "llama"),
        ("/home/alice", "."),
        ("from /home/alice/a/b, then", "from b, then"),
        ("--data=/home/alice/x", "--data=x"),
        (["a", {"b": "/data/x/y"}], ["a", {"b": "y"}]),
        (f"Bearer {HF}", "Bearer <token>"),
        ("sk-proj-" + 20 * "a", "<token>"),
        ("ghp_" + 36 * "a", "<token>"),
        ("github_pat_" + 22 * "a", "<token>"),
        ("glpat-" + 20 * "a", "<token>"),
        ("AKIAIOSFODNN7EXAMPLE", "<token>"),
        ("xoxb-123456789012-abc", "<token>"),
        ("AIza" + 35 * "a", "<token>"),
        (JWT, "<token>"),
        ("nvapi-" + 20 * "a", "<token>"),
        ("postgres://me:word@host/db", "postgres://<token>@host/db"),
        ("Authorization: Bearer abcdef", "Authorization: Bearer <token>"),
        ("-----BEGIN PRIVATE KEY-----\nabc\n-----END", "<token>"),
    ],
)
def test_paths_and_tokens_are_cut_and_their_fields_are_named(value, clean, tmp_path, caplog):
    assert cleaned(tmp_path, {"r": 8, "base": {"name": value}}) == {"r": 8, "base": {"name": clean}}
    field = "base.name.b" if isinstance(value, list) else "base.name"
    assert "adapter_config.json is pushed without values that look like" in caplog.text
    assert f"in: {field}." in caplog.text


@pytest.mark.parametrize(
    "key", ["token", "hub_token", "use_auth_token", "api_key", "OPENAI-API-KEY", "password", "db_password"]
)
@pytest.mark.parametrize("more", ["client_secret", "aws_secret_access_key", "credentials", "hf_token", "wandb_token"])
def test_a_secret_goes_with_its_name(key, more, tmp_path, caplog):
    assert cleaned(tmp_path, {key: "abc", "n": {more: {"k": "abc"}}, "m": 1}) == {"n": {}, "m": 1}
    assert f"{key}, n.{more}." in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        {"bos_token": "/usr/bin", "eos_token": HF, "image_token": "/a/b", "pad_token": "~/x"},
        {"added_tokens_decoder": {"5": {"content": "/usr/bin"}}, "additional_special_tokens": ["/usr/bin", HF]},
        {"extra_special_tokens": {"a": "/home/alice/x"}, "chat_template": "/home/alice {{ x }}"},
        {"id2label": {"0": "/m/01g317"}, "label2id": {"/m/01g317": 0}},
        {"architectures": ["GPT2"], "base": "meta-llama/Llama-3", "url": "https://host.org/a/b", "act": "gelu_new"},
        {"use_auth_token": True, "token": None, "max_tokens": 5, "password": ""},
        {"text": "/no think", "pattern": "/[a-z]+/", "ratio": "1/2", "note": "a/b and ./c", "slash": "/"},
    ],
)
def test_a_vocabulary_and_whatever_is_no_path_stay_and_nothing_is_said(content, tmp_path, caplog):
    assert cleaned(tmp_path, content, "tokenizer_config.json") == content
    assert not caplog.text


@pytest.mark.parametrize(
    "name", ["config.json", "sub/preprocessor_config.json", "config_sentence_transformers.json", "guidance_config.json"]
)
def test_settings_are_looked_at_in_all_folders(name, tmp_path):
    assert cleaned(tmp_path, {"x": "/a/b"}, name) == {"x": "b"}


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json"])
def test_vocabularies_are_not_touched(name, tmp_path):
    assert cleaned(tmp_path, {"/usr/bin": HF}, name) == {"/usr/bin": HF}


def test_the_folder_of_a_run_is_cut_out_and_a_file_that_is_linked_keeps_it(tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"note": f"log in {tmp_path}/out/log"}))
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    os.link(own, pushed / "config.json")
    scrub_settings(pushed, tmp_path / "out")
    assert json.loads((pushed / "config.json").read_text()) == {"note": "log in log"}
    assert str(tmp_path) in own.read_text()


def test_a_card_of_another_library_has_no_path_of_this_machine_either(tmp_path, caplog):
    (tmp_path / "README.md").write_text(f"base_model: {tmp_path}/out/base\nhttps://host.org/a\n", encoding="utf-8")
    scrub_settings(tmp_path, tmp_path / "out")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "base_model: base\nhttps://host.org/a\n"
    assert "README.md is pushed without" in caplog.text


def test_a_credential_under_the_name_of_a_word_is_cut_and_a_word_is_not(tmp_path, caplog):
    words = {"image_token": "<image>", "sep_token": "</s>", "my_tokens": ["/usr/bin", "a"]}
    assert cleaned(tmp_path, words | {"upload_token": "ghp_" + 36 * "a", "all_tokens": [HF]}) == words | {
        "upload_token": "<token>",
        "all_tokens": ["<token>"],
    }
    assert "in: upload_token, all_tokens." in caplog.text


def test_settings_that_cannot_be_read_are_left_out_and_named(tmp_path, caplog):
    (tmp_path / "odd_config.json").write_text("{")
    (tmp_path / "other_config.json").write_bytes(b"\xff\xfe\x00")
    scrub_settings(tmp_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert "odd_config.json cannot be read" in caplog.text
    assert "other_config.json cannot be read" in caplog.text
