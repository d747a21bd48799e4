"""Facts about a run for its model card, from the results that a recipe keeps."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hf_guidance.targets as own_networks
from hf_guidance.analysis.history import SPEED
from hf_guidance.card.contents import RunFacts
from hf_guidance.card.facts import EXAMPLES, known, task_facts
from hf_guidance.config import Json
from hf_guidance.experiments.report import Record, Report
from hf_guidance.trainer.run_facts import VERSIONS, pairs_facts, sizes_of, timms_name, training_facts

Facts = dict[str, Any]
LICENSE = "apache-2.0"


def facts_of_record(run: Record, report: Report) -> RunFacts:
    """Gather the facts of one guided run of a recipe, for `render`. Those in its `card` take precedence.

    Args:
        run: One of the report's runs.
        report: Content of `results.json`.
    """
    settings, task = run["settings"], report["task"]
    network = settings.get("network") or {}
    test = {name: value for name, value in run["test"].items() if name not in SPEED}
    facts: Facts = {
        "name": f"{task['name']}-{run['run']}",
        "license": LICENSE,
        "folder": _folder(run, report),
        "target": {
            "architecture": run["target"],
            "parameters": run["parameters"],
            "sizes": sizes_of(network),
            "untrained": True,
            "seed": run["seed"],
            "own_code": hasattr(own_networks, run["target"]),
        },
        "guide": _guide(run),
        "guidance": settings["guidance"],
        "pairs": pairs_facts(run["similarity"]),
        "results": {"split": "test", "values": test},
        "training": training_facts(settings, run["steps"], run["seed"]),
        "cost": {"hardware": run["environment"]["device"]},
        "data": task_facts(task["name"], task["description"], settings["data"]),
        "example": EXAMPLES.get(task["name"]),
        "command": report["command"],  # results hold a command of known settings only
        "command_is_cut": report.get("command_is_cut"),
        "versions": {name: run["environment"][name] for name in VERSIONS},
    }
    own: dict[str, Any] = {
        name: fact for name, fact in (run.get("card") or {}).items() if not name.startswith("command")
    }
    found: Any = known(merged(facts, own))
    return found  # the report's command may have resumed the runs of earlier ones


def _guide(run: Record) -> Facts:
    norm = run["settings"]["guidance"]["guide_batch_norm"] != "eval"
    config = run["guide"].get("config") or {}
    timms = known({"timm": timms_name(config)})
    return run["guide"] | {"sizes": sizes_of(config), "batch_norm": norm} | timms


def _folder(run: Record, report: Report) -> str | None:
    """Return the folder of the network, if the command names its output folder."""
    words = shlex.split(report["command"])
    if "--output_dir" not in words[:-1] or Path(words[words.index("--output_dir") + 1]).is_absolute():
        return None
    return f"{words[words.index('--output_dir') + 1]}/seed-{run['seed']}/{run['run']}"


def merged(facts: Mapping[str, Json], more: Mapping[str, Json]) -> dict[str, Json]:
    """Merge two sets of facts section by section; the second takes precedence."""
    found: dict[str, Json] = {**facts, **more}
    for name, theirs in more.items():
        if isinstance(ours := facts.get(name), dict) and isinstance(theirs, dict):
            found[name] = ours | theirs
    return found
