"""The facts that runs keep have the names that are declared, and no others."""

import json
from pathlib import Path

import pytest

from hf_guidance.card.contents import Network, PairRow, Pairs, Results, RunFacts

REPOSITORY = Path(__file__).parents[2]
REPORTS = [
    *(REPOSITORY / "recipes" / "results").glob("*.json"),
    REPOSITORY / "tests" / "earlier" / "recipe" / "results.json",
]
CARDS = [
    pytest.param(run["card"], id=f"{path.stem}-{run['run']}-{run['seed']}")
    for path in sorted(REPORTS)
    for run in json.loads(path.read_text())["runs"]
    if run.get("card")
]
ALWAYS = {"name", "target", "guide", "guidance", "pairs", "results", "training", "cost", "data", "versions"}


def declared(kind):
    return set(kind.__annotations__)


@pytest.mark.parametrize("card", CARDS)
def test_kept_facts_have_declared_names(card):
    assert ALWAYS <= card.keys() <= declared(RunFacts)
    assert card["target"].keys() <= declared(Network)
    assert card["guide"].keys() <= declared(Network) | {"versions"}
    assert card["pairs"].keys() == declared(Pairs)
    assert all(declared(PairRow) - {"debiased"} <= row.keys() <= declared(PairRow) for row in card["pairs"]["rows"])
    assert card["results"].keys() <= declared(Results)


def test_there_are_cards():
    assert len(CARDS) > 30
