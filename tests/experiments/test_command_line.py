"""A recipe's flags, beside those of the two configs."""

import dataclasses
import sys

import pytest

from hf_guidance.experiments.command_line import check_choice, flags_of_the_claim, parse


@dataclasses.dataclass
class Own:
    size: int = 1
    fast: bool = False


def parsed(monkeypatch, *words, defaults=lambda own: {"learning_rate": 0.5, "output_dir": "out", "use_cpu": True}):
    monkeypatch.setattr(sys, "argv", ["recipe.py", *words])
    return parse("what it is for", Own, defaults, refused={"--seed"}, instead="Use --seeds instead")


def test_flags_of_all_three_are_read_and_a_recipes_defaults_stand_where_nothing_is_given(monkeypatch):
    own, args, guidance = parsed(monkeypatch, "--size", "3", "--fast", "--measure", "rsa", "--weight_decay", "0.1")
    assert (own, guidance.measure) == (Own(3, True), "rsa")
    assert (args.learning_rate, args.weight_decay) == (0.5, 0.1)
    assert parsed(monkeypatch, "--learning_rate", "0.25")[1].learning_rate == 0.25


def test_explicit_pairs_take_the_place_of_a_recipes_layers(monkeypatch):
    def defaults(own):
        return {"output_dir": "out", "use_cpu": True, "guide_layers": ["Conv2d"]}

    assert parsed(monkeypatch, defaults=defaults)[2].guide_layers == ["Conv2d"]
    guidance = parsed(monkeypatch, "--layer_pairs", "a~b", defaults=defaults)[2]
    assert (guidance.layer_pairs, guidance.guide_layers) == (["a~b"], ["hidden_states"])


def test_refused_and_impossible_flags_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"--seed: Use --seeds instead\."):
        parsed(monkeypatch, "--seed=3")
    with pytest.raises(ValueError, match="--kind c: possible are a, b"):
        check_choice("kind", "c", ["a", "b"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--siz", "3"], r"^unknown flags: --siz\. Did you mean --size\? --help lists all\.$"),
        (["--weight=3", "--zzz"], r"^unknown flags: --weight=3, --zzz\. Did you mean --"),
        (["stray"], r"^unknown flags: stray\. --help lists all\.$"),
        (["--size", "x"], r"^argument --size: invalid int value: 'x'\. --help lists all flags\.$"),
        (["--max_steps", "x"], r"^argument --max_steps/--max-steps: invalid int value: 'x'\. --help"),
        (
            ["--load_best_model_at_end", "--eval_strategy", "steps", "--save_strategy", "epoch"],
            "^--load_best_model_at_en",
        ),
        (["--sketch", "1"], "^sketch is 1; it must be at least 2"),
    ],
)
def test_a_wrong_flag_is_an_error_without_the_list_of_all_flags(words, said, monkeypatch, capsys):
    with pytest.raises(ValueError, match=said):
        parsed(monkeypatch, *words)
    assert capsys.readouterr() == ("", "")


def test_a_claim_stands_for_its_flags(monkeypatch, capsys):
    claims = {"deep": "--size 3\n  --fast", "wide": "--size 4"}
    for words, flags in (
        ([], []),
        (["--claim", "deep"], ["--size", "3", "--fast"]),
        (["--claim=wide", "--size", "9"], ["--size", "4"]),
    ):
        monkeypatch.setattr(sys, "argv", ["recipe.py", *words])
        assert flags_of_the_claim(claims) == flags
    assert capsys.readouterr().out == "--claim deep: --size 3 --fast\n--claim wide: --size 4\n"
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--claim", "tall"])
    with pytest.raises(ValueError, match="--claim tall: possible are deep, wide"):
        flags_of_the_claim(claims)
