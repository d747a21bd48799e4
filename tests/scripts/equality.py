"""Trains the same global batch on one process and on two, under settings that must not matter, and compares.

PYTHONPATH=tests python tests/scripts/equality.py    prints the table that stands in recipes/guides/many_gpus.md
torchrun … tests/scripts/equality.py FILE ROW …       one side of it
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from builders import VOCABULARY, arguments, gpt2, linear, llama, seeded
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from transformers import Trainer

from hf_guidance import GuidanceConfig, GuidanceTrainer

BATCH, ALL_STEPS = 8, 20
STEPS = int(os.environ.get("EQUALITY_STEPS", ALL_STEPS))  # the first of them
SHARED = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0}
OPTIMIZERS = {
    "SGD": {**SHARED, "optim": "sgd", "learning_rate": 0.1},
    "AdamW": {**SHARED, "optim": "adamw_torch", "learning_rate": 1e-3},
}
# the modules whose outputs are the hidden states: the last of these comes after the final norm
MODULES = {"target_layers": ["transformer.h.0", "transformer.ln_f"], "guide_layers": ["layers.0", "layers.1", "norm"]}
UNEVEN = {"accelerator_config": {"even_batches": False, "dispatch_batches": False}, "max_steps": -1}
# row → (what differs on two processes from one, what both have in common); a config's fields and arguments alike.
# Each is run under each of the optimizers.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hidden states": ({}, {}),
    "named modules": (MODULES, {}),
    "activation checkpointing": ({"gradient_checkpointing": True}, {}),
    "activation checkpointing, named modules": ({"gradient_checkpointing": True, **MODULES}, {}),
    "torch.compile": ({"torch_compile": True}, {}),
    "tokens, 12 of them": ({}, {"sample_axis": "token", "max_tokens": 12}),
    "all tokens, more than there are features": ({}, {"sample_axis": "token"}),  # which need no Gram matrices
    "sequences of other lengths on each rank": ({}, {"ragged": True}),
    "the same, tokens": ({}, {"ragged": True, "sample_axis": "token", "max_tokens": 12}),
    "ridge": ({}, {"measure": "ridge"}),
    "a guide on 3 of the rows": ({}, {"guide_rows": 3}),  # in some steps a process has none of them
    "the same, sequences of other lengths": ({}, {"guide_rows": 5, "ragged": True}),
    "within each row, ragged": ({"similarity_batch": "local"}, {"sample_axis": "within", "ragged": True}),
    "within each row, ragged, accumulation": (
        {"similarity_batch": "local", "gradient_accumulation_steps": 2, "batch": BATCH // 4},
        {"sample_axis": "within", "ragged": True},
    ),
    "sketch of 64": ({}, {"sketch": 64}),
    "batch norm, synchronised": ({}, {"norm": True}),
    "a last batch of 5 rows, 4 and 1": ({}, {"rows": BATCH * STEPS - 3, **UNEVEN}),
    "plain Trainer, no guidance": ({}, {"plain": True}),
}
SLOW = {"torch.compile"}
# two processes beside one, where equality is not claimed
UNLIKE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "local similarity": ({"similarity_batch": "local"}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2, "batch": BATCH // 4}, {}),
    "noise of each rank's own": ({}, {"guide_input": "noise"}),
}


class SynchronisedNorm(nn.Module):
    """Batch norm by the statistics of all processes; torch's own SyncBatchNorm runs on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        count = torch.tensor(float(x.shape[0] * x.shape[1]))
        total, squares, count = (self._over_all(part) for part in (x.sum((0, 1)), x.square().sum((0, 1)), count))
        mean = total / count
        return (x - mean) * (squares / count - mean.square() + 1e-5).rsqrt()

    @staticmethod
    def _over_all(value: Tensor) -> Tensor:
        return all_reduce(value) if torch.distributed.is_initialized() else value


def rows(count: int, ragged: bool) -> list[dict[str, Tensor]]:
    """Random tokens, the labels the same."""

    def draw() -> list[dict[str, Tensor]]:
        lengths = torch.randint(3, 9, (count,)) if ragged else torch.full((count,), 6)
        return [{"input_ids": torch.randint(VOCABULARY, (int(length),))} for length in lengths]

    return seeded(draw, 5)


def collate(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Right-padded to the longest of this rank's rows; a mask where there is padding at all among such rows."""
    ids = [row["input_ids"] for row in batch]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    labels = torch.where(mask.bool(), padded, -100)
    return {"input_ids": padded, "attention_mask": mask, "labels": labels}


def run(folder: str, optimizer: str, own: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """Losses at every step and the weights after the last."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {**OPTIMIZERS[optimizer], "max_steps": STEPS, **common, **(own if processes > 1 else {})}
    data = rows(settings.pop("rows", BATCH * ALL_STEPS), settings.pop("ragged", False))
    batch, plain = settings.pop("batch", BATCH // processes), settings.pop("plain", False)
    norm = settings.pop("norm", False)
    fields = GuidanceConfig.__dataclass_fields__.keys() & settings.keys()
    config = {name: settings.pop(name) for name in fields}
    config = {"similarity_batch": "global" if processes > 1 else "local", "log_measures": [], **config}
    args = arguments(
        folder,
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        ddp_find_unused_parameters=False,
        **settings,
    )
    options: dict[str, Any] = {"args": args, "train_dataset": data, "data_collator": collate}
    guided = {} if plain else {"guide": llama(), "guidance": linear(**config)}
    model = gpt2()
    if norm:
        model.transformer.drop = SynchronisedNorm()  # where no bias comes before it, that it would hide
    trainer = (Trainer if plain else GuidanceTrainer)(model=model, **options, **guided)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    weights = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).state_dict()
    return {
        "losses": torch.tensor([[log["loss"], log.get("guidance/loss", 1.0)] for log in logs]),
        "weights": {name: value.clone() for name, value in weights.items()},
    }


def main(path: Path, names: list[str]) -> None:
    gc.freeze()  # Trainer collects garbage at every start
    torch.set_num_threads(1)
    every = {**ROWS, **UNLIKE}
    with tempfile.TemporaryDirectory() as folder:
        found = {(name, optimizer): run(folder, optimizer, *every[name]) for name in names for optimizer in OPTIMIZERS}
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(found, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def both(folder: Path, names: list[str], steps: int = ALL_STEPS) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what one process and two came to after so many steps."""
    here = Path(__file__)
    paths = os.pathsep.join([str(here.parents[1]), str(here.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "EQUALITY_STEPS": str(steps)}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    sides = []
    for name, launcher in (("one", []), ("two", launch)):
        path = folder / f"{name}.pt"
        command = [sys.executable, *launcher, str(here), str(path), *names]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        assert path.exists(), done.stderr[-3000:]  # gloo may abort after success
        sides.append(torch.load(path))
    return sides[0], sides[1]


def differences(one: dict[str, Any], two: dict[str, Any], keys: bool = True) -> tuple[float, float]:
    """Largest relative difference of a loss at any step, and of a tensor of weights after the last (in norm).

    Without the `keys`, the biases of attention's keys are left out: softmax does not see them, so that their gradient
    is rounding and nothing else, which AdamW scales up to steps of full size.
    """
    assert one["losses"].shape == two["losses"].shape
    for side in (one, two):  # NaN compares as no difference
        assert all(value.isfinite().all() for value in (side["losses"], *side["weights"].values()))
    losses = ((one["losses"] - two["losses"]).abs() / one["losses"].abs()).max().item()
    found = []
    for name, value in one["weights"].items():
        pair = [value.double(), two["weights"][name].double()]
        if not keys and name.endswith("c_attn.bias"):
            third = len(value) // 3
            pair = [torch.cat([side[:third], side[2 * third :]]) for side in pair]
        found.append(((pair[0] - pair[1]).norm() / pair[0].norm()).item())
    return losses, max(found)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]), sys.argv[2:])
    else:
        with tempfile.TemporaryDirectory() as place:
            one, two = both(Path(place), list(ROWS))
        columns = ("SGD: losses", "weights", "AdamW: losses", "weights but for keys' biases", "all weights")
        print("| two processes of 4 samples, the global batch | " + " | ".join(columns) + " |")
        print("|---|---|---|---|---|---|")
        for row in ROWS:
            sgd, adamw = (row, "SGD"), (row, "AdamW")
            but_for_keys = differences(one[adamw], two[adamw], keys=False)
            found = (*differences(one[sgd], two[sgd]), *but_for_keys, differences(one[adamw], two[adamw])[1])
            print(f"| {row} | " + " | ".join(f"{difference:.0e}" for difference in found) + " |")
