"""Whether every architecture is guided, and guides: the families of transformers, timm and torchvision, made small.

    python tests/scripts/architectures.py outputs/architectures [--family transformers timm] [--only bert gpt2]

Each network is run for three guided steps as the target of a simple partner, and for three as its guide, with default
settings, and is then checked without a reference: like a copy of itself, blind to padding and to the order of rows,
read at the outputs of its blocks, unchanged as a guide. The folder receives `results.jsonl`, one line for each network
and role: `right`, `refused` (a ValueError or TypeError of hf_guidance's own) or `other`. What does not run by itself on
the small batch is `not built`. The same command goes on after a stop; it takes about half an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from architecture_checks import CHECKS, train
from small_networks import FAMILIES, Case, case_named, names_of

ROLES = ("target", "guide")
SECONDS = 60  # for one network in both roles


def result_of(error: BaseException) -> dict[str, str]:
    """Return what an error means: `refused` if it is hf_guidance's own, else `other`."""
    place = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    file = place.filename if place else ""
    own = isinstance(error, (ValueError, TypeError)) and f"{os.sep}hf_guidance{os.sep}" in file
    said = " ".join(str(error).split())
    at = f"{Path(file).name}:{place.lineno}" if place else ""
    return {"result": "refused" if own else "other", "message": f"{type(error).__name__}: {said[:400]}", "at": at}


def results_of(name: str) -> Iterator[dict[str, Any]]:
    """Build a network, and yield a result for each role."""
    try:
        case = case_named(name)
    except Exception as error:  # a network's own code may raise anything
        for role in ROLES:
            yield {"name": name, "role": role, **result_of(error), "result": "not built"}
        return
    for role in ROLES:
        yield {"name": name, "role": role, "kind": case.kind, **in_role(case, role)}


def in_role(case: Case, role: str) -> dict[str, Any]:
    """Return the result of a network in a role: of default layers, else of named blocks."""
    by_default = worst = ""
    try:
        train(case, role)
    except Exception as error:
        result = result_of(error)
        if not case.blocks or case.layers == case.blocks or "hidden_states" not in result["message"]:
            return result
        by_default, case = f"{result['result']}: {result['message']} at {result['at']}", case.by_blocks()
        worst = "other" if result["result"] == "other" else ""
        try:
            train(case, role)
        except Exception as error:
            return {**result_of(error), "by_default": by_default}
    checks: dict[str, str] = {}
    for check in CHECKS:
        try:
            checks[check.__name__] = check(case, role)
        except Exception as error:
            result = result_of(error)
            checks[check.__name__] = f"{result['result']}: {result['message']} at {result['at']}"
            worst = "other" if "other" in (worst, result["result"]) else "refused"
    said = {"by_default": by_default} if by_default else {}
    bad = [by_default] * bool(worst and by_default)
    bad += [f"{n}: {v}" for n, v in checks.items() if v.startswith(("other", "refused"))]
    return {"result": worst or "right", **said, "checks": checks, **({"message": "; ".join(bad)} if bad else {})}


def run_apart(name: str, seconds: int, write: Callable[[dict[str, Any]], None]) -> None:
    """Run one network in a process of its own, so that a crash or a long one loses only this one."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(seconds)
        for result in results_of(name):
            write(result)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if status:
        why = f"took more than {seconds} s" if status == signal.SIGALRM else f"ended with status {status}"
        write({"name": name, "role": "both", "result": "other", "message": why})


def report(results: list[dict[str, Any]]) -> None:
    """Print the counts, and what is refused or other."""
    print(dict(Counter(result["result"] for result in results)))
    for kind in ("refused", "other", "not built"):
        print(f"\n{kind}:")
        for result in results:
            if result["result"] == kind:
                print(f"  {result['name']} ({result['role']}): {result.get('message', '')} {result.get('at', '')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--only", nargs="*", help="names of networks")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="for one network in both roles")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = {json.loads(line)["name"] for line in lines}

    def write(result: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")

    start = time.monotonic()
    for name in options.only or [name for family in options.family for name in names_of(family)]:
        if name not in done:
            run_apart(name, options.seconds, write)
    results = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    report([r for r in results if not options.only or r["name"] in options.only])
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
