"""Stops training at random moments, by SIGKILL, SIGTERM and SIGINT, and resumes it; compares the weights at the end.

python tests/scripts/stops.py <folder> --kills 20
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from builders import NormNet, gpt2, llama, llama_config, token_rows
from trainers import make_trainer, same

from hf_guidance import load_guide
from hf_guidance.trainer.checkpoints import fault_of, last_complete_checkpoint

STEPS = 12
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "scheduled": (llama, {"guidance_schedule": "cosine", "guidance_stop_step": 9}),
    "calibrated": (NormNet, {"guide_layers": ["out"], "guide_batch_norm": "calibrated", "calibration_batches": 2}),
    "some tokens": (llama, {"sample_axis": "token", "max_tokens": 9}),
    "noise": (llama, {"guide_input": "noise"}),
    "untrained": (lambda: load_guide(llama_config(), seed=3), {}),
    "constant": (llama, {}),
}


def train(folder: Path, kind: str) -> None:
    """Run to the end, or what is left of it; the weights at the end go to `weights.pt`."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have switched off
    make_guide, config = KINDS[kind]
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": STEPS}
    shape = {"gradient_accumulation_steps": 2, "train_dataset": token_rows(40)}
    trainer = make_trainer(folder, gpt2(dropout=0.2), make_guide(), **saving, **shape, **config)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder) is not None)
    torch.save(trainer.model.state_dict(), folder / "weights.pt")


class Stops:
    """Runs in processes of their own, forked from one that has imported everything.

    Args:
        folder: for the runs.
        seed: of the moments.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["builders", "trainers", "hf_guidance", "transformers.trainer"])
        warm = self.processes.Process(target=abs, args=(0,))  # the server imports now, which is no run's time
        warm.start()
        warm.join()
        self.unbroken: dict[str, tuple[dict[str, torch.Tensor], float]] = {}  # weights and seconds

    def start(self, folder: Path, kind: str) -> Any:
        process = self.processes.Process(target=train, args=(folder, kind))
        process.start()
        return process

    def to_the_end(self, folder: Path, kind: str) -> dict[str, torch.Tensor]:
        process = self.start(folder, kind)
        process.join()
        assert process.exitcode == 0, f"{kind}: exit code {process.exitcode}"
        return torch.load(folder / "weights.pt")

    def reference(self, kind: str) -> tuple[dict[str, torch.Tensor], float]:
        if kind not in self.unbroken:
            began = time.monotonic()
            weights = self.to_the_end(self.folder / f"{kind}-unbroken", kind)
            self.unbroken[kind] = weights, time.monotonic() - began
        return self.unbroken[kind]

    def stop(self, number: int, kind: str, by: signal.Signals) -> dict[str, Any]:
        """One run that is stopped, once, and resumed."""
        weights, seconds = self.reference(kind)
        folder, killed = self.folder / f"{kind}-{number}", False
        while not (killed and last_complete_checkpoint(folder)):  # one that was done, or had not begun yet, is no stop
            shutil.rmtree(folder, ignore_errors=True)
            began = time.monotonic()
            process = self.start(folder, kind)
            process.join(timeout=self.random.uniform(0.2, 1.0) * seconds)
            if killed := process.is_alive():
                os.kill(process.pid, by)
            process.join()
            killed = killed and process.exitcode != 0
            if (folder / "weights.pt").is_file():  # done: the machine is faster now than for the reference
                seconds = min(seconds, time.monotonic() - began)
        torn = [path.name for path in folder.glob("checkpoint-*") if fault_of(path)]
        whole = last_complete_checkpoint(folder)
        result = {"kind": kind, "by": by.name, "resumed from": Path(str(whole)).name, "torn": torn}
        result["identical"] = same(self.to_the_end(folder, kind), weights)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    stops, results = Stops(given.folder, given.seed), []
    for number in range(given.kills):
        kind, by = list(KINDS)[number % len(KINDS)], SIGNALS[(number + number // len(KINDS)) % len(SIGNALS)]
        results.append(stops.stop(number, kind, by))
        print(results[-1], flush=True)
    identical = sum(result["identical"] for result in results)
    torn = sum(bool(result["torn"]) for result in results)
    print(f"{identical} of {given.kills} resumed and bit-identical; {torn} stops left a torn checkpoint.")
    (given.folder / "stops.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
