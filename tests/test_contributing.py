"""The commands and files that CONTRIBUTING.md names exist."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_files_it_names_exist() -> None:
    named = set(re.findall(r"\b(?:tests|hf_guidance|recipes)/[\w/]+\.(?:py|md)\b|(?<!/)\b[A-Z]+\.(?:md|cff)\b", TEXT))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (REPOSITORY / name).is_file()] == []


def test_its_commands_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    lines = re.findall(r"\bmake ((?:[a-z-]+ ?)+)", TEXT)
    assert len(lines) > 3
    assert {word for line in lines for word in line.split()} <= targets
