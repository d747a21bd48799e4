"""The changelog's latest release is this version, and new entries have a place above it."""

import re
from pathlib import Path

import yaml

import hf_guidance

REPOSITORY = Path(__file__).parents[1]


def test_the_latest_release_has_the_version_and_date_of_package_and_citation() -> None:
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased, latest, *_ = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert unreleased == "Unreleased"
    assert latest == f"{hf_guidance.__version__} – {citation['date-released']}"
