"""Tables of results, and a command that a page shows whole."""

import shlex

from hf_guidance.card.result_sections import WIDTH, command_lines, results, values


def test_metrics_have_four_digits_and_the_name_of_their_split():
    lines = results({"results": {"split": "test", "values": {"top_5_accuracy": 0.12345, "loss": 2}}}).splitlines()
    assert lines == [
        "| metric         | test data |",
        "|----------------|-----------|",
        "| top 5 accuracy | 0.1235    |",
        "| loss           | 2.0000    |",
    ]
    assert results({}) == ""


def test_values_are_shown_as_they_are_but_for_what_is_not_known():
    facts = {"training": {"steps": 3, "weight_decay": None}, "data": {"id": "me/rows"}}
    assert values(facts, "training").splitlines()[2:] == ["| steps    | 3   |"]
    assert values(facts, "data") == values(facts, "cost") == ""


def test_a_command_is_broken_between_its_flags_and_means_the_same():
    command = f"python train.py --output_dir {'a' * WIDTH} --text_files 'a b.txt' c.txt --use_cpu"
    text = command_lines({"command": command})
    lines = text.removeprefix("```sh\n").removesuffix("\n```").splitlines()
    assert [line.split()[0] for line in lines] == ["python", "--text_files"]
    assert shlex.split(" ".join(line.removesuffix("\\") for line in lines)) == shlex.split(command)
    assert command_lines({}) == ""
