"""A recipe's flags, beside those of the two configs."""

import dataclasses
import json
import runpy
import sys

import pytest
import yaml
from launching import REPOSITORY

from hf_guidance import GuidanceConfig
from hf_guidance.experiments.arguments import RecipeArguments
from hf_guidance.experiments.command_line import check_choice, parse, with_flags_of_the_claim, with_flags_of_the_file


@dataclasses.dataclass
class Own:
    size: int = 1
    fast: bool = False


def defaults_of(own):
    return {"learning_rate": 0.5, "output_dir": "out", "use_cpu": True}


def parsed(monkeypatch, *words, defaults=defaults_of, arguments=Own, file=None):
    monkeypatch.setattr(sys, "argv", ["recipe.py", *words])
    return parse("what it is for", arguments, defaults, refused={"--seed"}, instead="Use --seeds instead", file=file)


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
    with pytest.raises(ValueError, match=r"^--kind 'b a': possible are a, b\. If a list is meant: \[b, a\] in a file"):
        check_choice("kind", "b a", iter(["a", "b"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--siz", "3"], r"^unknown flags: --siz\. Did you mean --size\? --help lists all\.$"),
        (["--weight=3", "--zzz"], r"^unknown flags: --weight=3, --zzz\. Did you mean --"),
        (
            ["--learning_rate", "1", "2"],
            r"^--learning_rate takes one value, and 2 is left over: only flags of guidance",
        ),
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


def test_a_flag_that_takes_one_value_names_the_one_that_tries_several(monkeypatch):
    with pytest.raises(ValueError, match=r"as a sweep, and --learning_rates tries several\.$"):
        parsed(monkeypatch, "--learning_rate", "1", "2", arguments=RecipeArguments)


CLAIMS = {"deep": "--size 3\n  --fast", "wide": "--size 4"}


def test_a_claim_stands_for_its_flags(capsys):
    assert with_flags_of_the_claim(["--size", "9"], CLAIMS) == ["--size", "9"]
    claimed = with_flags_of_the_claim(["--claim", "deep"], CLAIMS)
    assert claimed == ["--size", "3", "--fast", "--claim", "deep"]
    assert with_flags_of_the_claim(["--claim=wide", "--size", "9"], CLAIMS)[:2] == ["--size", "4"]
    assert capsys.readouterr().out == "--claim deep: --size 3 --fast\n--claim wide: --size 4\n"
    assert with_flags_of_the_claim(["--claim", "two"], {"two": "--a 1 2 --b --a 3"})[:3] == ["--a", "3", "--b"]
    with pytest.raises(ValueError, match="--claim tall: possible are deep, wide"):
        with_flags_of_the_claim(["--claim", "tall"], CLAIMS)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_stands_for_flags_which_the_command_line_replaces(suffix, tmp_path, monkeypatch):
    values = {"size": 3, "fast": True, "measure": "rsa", "guide_layers": ["a", "b.*"], "sketch": None}
    path = tmp_path / f"settings.{suffix}"
    path.write_text(yaml.safe_dump(values, sort_keys=False) if suffix == "yaml" else json.dumps(values))
    words = with_flags_of_the_file(["--config", str(path), "--measure", "ridge"])
    assert " ".join(words) == "--size 3 --fast true --guide_layers a b.* --measure ridge"
    own, _, guidance = parsed(monkeypatch, *words)
    assert (own.size, own.fast, guidance.measure, guidance.guide_layers) == (3, True, "ridge", ["a", "b.*"])
    assert with_flags_of_the_file([f"--config={path}", "--size=4"])[:2] == ["--fast", "true"]
    path.write_text(json.dumps({"claim": "deep", "size": 7}))
    both = with_flags_of_the_claim(with_flags_of_the_file(["--config", str(path)]), CLAIMS)
    assert " ".join(both) == "--size 3 --fast --claim deep --size 7"


def test_a_file_that_is_none_of_flags_and_a_flag_given_twice_are_errors(tmp_path, monkeypatch):
    path = tmp_path / "settings.yaml"
    with pytest.raises(ValueError, match=r"--config .*settings.yaml cannot be read: .*No such file"):
        with_flags_of_the_file(["--config", str(path)])
    for text, said in (("- size", "holds list; expected names of flags"), ("a: [", "cannot be read: while parsing")):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            with_flags_of_the_file(["--config", str(path)])
    path.write_text("config: a.yaml")
    with pytest.raises(ValueError, match=r"settings.yaml names 'config': a file may not name another one\.$"):
        with_flags_of_the_file(["--config", str(path)])
    path.write_text("mesure: ridge")
    with pytest.raises(ValueError, match=r"unknown flags: --mesure.* Did you mean --measure\?"):
        parsed(monkeypatch, *with_flags_of_the_file(["--config", str(path)]))
    words = [*with_flags_of_the_file(["--config", str(path)]), "--other"]
    with pytest.raises(ValueError, match=rf"^unknown flags: --mesure, --other \(--mesure in --config {path}\)\. Did y"):
        parsed(monkeypatch, *words, file=str(path))
    with pytest.raises(ValueError, match=r"^--size is given twice: which value is meant\?$"):
        with_flags_of_the_file(["--size", "1", "--fast", "--size=2"])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("measure: ridge\nmax_steps: 3\nmeasure: rsa\n", "measure"),
        ('{"measure": "ridge",\n "max_steps": 3, "measure": "ridge"}', "measure"),
        ("use-cpu: true\nuse_cpu: false", "use_cpu"),
        ("optim_args: {a: 1, b: 2, a: 3}", "a"),
    ],
)
def test_a_name_that_a_file_holds_twice_is_an_error_of_one_line(text, name, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^--config \S+ names '{name}' twice: which value is meant\?$"):
        with_flags_of_the_file(["--config", str(path)])


@pytest.mark.parametrize("flag", ["-h", "--help", "--help_guidance", "--help_training"])
def test_help_is_three_pages_of_which_the_first_is_short(flag, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(monkeypatch, "--size", "3", flag)
    assert stopped.value.code == 0
    page = capsys.readouterr().out
    explained = {line.split()[0] for line in page.splitlines() if line.startswith("  --")}
    of_guidance = {f"--{field.name}" for field in dataclasses.fields(GuidanceConfig)}
    if flag == "--help_guidance":
        assert explained == of_guidance
    elif flag == "--help_training":
        assert {"--learning_rate", "--bf16", "--max_steps"} <= explained
        assert not explained & of_guidance
    else:
        assert page.startswith("what it is for")
        assert explained == {"--size", "--fast"}
        assert of_guidance <= set(page.split())
    assert max(map(len, page.splitlines())) <= 120


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_the_help_of_a_recipe_is_at_most_120_lines(recipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(recipe), "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(recipe), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert 20 < len(lines) <= 120
    prose = [line[:1].strip() != "" for line in lines]
    assert not [line for line, *both in zip(lines, prose, prose[1:], strict=False) if all(both) and len(line) < 80]
