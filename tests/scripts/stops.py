"""Stops training at random moments, by SIGKILL, SIGTERM and SIGINT, and resumes it; compares the weights at the end.

python tests/scripts/stops.py <folder> --kills 60
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from builders import NormNet, gpt2, llama, llama_config, token_rows
from datasets import Dataset
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
    "now and then": (llama, {"guidance_every": 3}),
    "within rows": (llama, {"sample_axis": "within", "guide_rows": 3, "guidance_warmup_steps": 4}),
    "accumulated": (llama, {"similarity_batch": "accumulated"}),
    "sketched": (llama, {"sketch": 16}),
    "cached": (llama, {"sketch": 16, "cache_guide": "cache", "sample_id_column": "id"}),
    "best at the end": (llama, {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}),
    "a stream": (llama, {}),
    "a stream of two processes": (llama, {"similarity_batch": "global"}),
    "two processes": (llama, {"similarity_batch": "global", "sample_axis": "token", "max_tokens": 9}),
    "two processes, cached": (llama, {"sketch": 16, "cache_guide": "cache", "sample_id_column": "id"}),
}
ROWS = 200  # more than two processes take: a second pass over a stream is not resumed to the bit


def train(folder: Path, kind: str, place: Mapping[str, str]) -> None:
    """Run to the end, or what is left of it; the weights at the end go to `weights.pt`."""
    os.environ.update(place)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have switched off
    make_guide, config = KINDS[kind]
    config = config | ({"cache_guide": str(folder / "cache")} if "cache_guide" in config else {})
    rows: Any = [row | {"id": torch.tensor(i)} for i, row in enumerate(token_rows(ROWS))]
    if "cache_guide" in config:
        rows = [{name: row[name] for name in ("input_ids", "labels", "id")} for row in rows]
    else:
        rows = [{name: value for name, value in row.items() if name != "id"} for row in rows]
    data = {"train_dataset": rows, "eval_dataset": rows[:8]}
    if "stream" in kind:
        data["train_dataset"] = Dataset.from_list(rows).with_format("torch").to_iterable_dataset(num_shards=2)
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": STEPS}
    shape = {"gradient_accumulation_steps": 2, "ddp_find_unused_parameters": False}
    trainer = make_trainer(folder, gpt2(dropout=0.2), make_guide(), **saving, **shape, **data, **config)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder) is not None)
    if trainer.is_world_process_zero():
        torch.save(trainer.accelerator.unwrap_model(trainer.model).state_dict(), folder / "weights.pt")


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

    def start(self, folder: Path, kind: str) -> list[Any]:
        places: list[dict[str, str]] = [{}]
        if "two processes" in kind:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
            places = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
        running = [self.processes.Process(target=train, args=(folder, kind, place)) for place in places]
        for process in running:
            process.start()
        return running

    def to_the_end(self, folder: Path, kind: str) -> dict[str, torch.Tensor]:
        running = self.start(folder, kind)
        for process in running:
            process.join()
        codes = [process.exitcode for process in running]
        assert (folder / "weights.pt").is_file(), f"{kind}: exit codes {codes}"  # gloo may abort after success
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
            running = self.start(folder, kind)
            running[0].join(timeout=self.random.uniform(0.2, 1.0) * seconds)
            if killed := running[0].is_alive():
                for process in running:
                    if process.is_alive():
                        os.kill(process.pid, by)
            for process in running:
                process.join()
            killed = killed and running[0].exitcode != 0
            if (folder / "weights.pt").is_file():  # done: the machine is faster now than for the reference
                seconds = min(seconds, time.monotonic() - began)
            elif not last_complete_checkpoint(folder):  # not begun: the machine is slower now
                seconds *= 1.5
        torn = [path.name for path in folder.glob("checkpoint-*") if fault_of(path)]
        whole = last_complete_checkpoint(folder)
        result = {"kind": kind, "by": by.name, "resumed from": Path(str(whole)).name, "torn": torn}
        result["identical"] = same(self.to_the_end(folder, kind), weights)
        shutil.rmtree(folder)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=60)
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
