"""Stops guidance at a similarity on each of several processes, unbroken and resumed; `test_similarity_stop.py` judges.

torchrun --standalone --nproc_per_node 2 tests/scripts/two_stops.py <folder> --use_cpu
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from builders import gpt2, llama, token_rows
from trainers import make_trainer, weights

from hf_guidance.trainer.similarity_stop import stop_among

RUN: dict[str, Any] = {
    "measure": "linear_cka",
    "log_measures": [],
    "max_steps": 65,
    "guidance_weight": 5.0,
    "logging_steps": 9,
    "save_strategy": "steps",
    "save_steps": 15,  # between the decisions after steps 20 and 40 too
    "ddp_find_unused_parameters": False,
}


def main(folder: Path) -> None:
    assert "--use_cpu" in sys.argv
    gc.freeze()  # Trainer collects garbage at every start
    seen = {batch: stops(folder / batch, batch) for batch in ("local", "global")}
    rank = torch.distributed.get_rank()
    torch.save(seen, folder / f"rank{rank}.pt.part")
    (folder / f"rank{rank}.pt.part").rename(folder / f"rank{rank}.pt")
    torch.distributed.barrier()


def stops(folder: Path, batch: str) -> dict[str, Any]:
    """One run for the similarities alone, one that stops at a threshold among them, and the rest of it resumed."""
    _, saw = train(folder / "all", batch, 1.0)
    joint = [statistics.fmean(values) for values in zip(*gather_object([saw]), strict=True)]
    # one that steps 31 to 40 reach and steps 21 to 40 do not: a resumed run needs the sums of its checkpoint
    threshold = (statistics.fmean(joint[20:40]) + statistics.fmean(joint[30:40])) / 2
    found: dict[str, Any] = {"saw": saw, "threshold": threshold}
    found["unbroken"], _ = train(folder / "run", batch, threshold)
    state = json.loads((folder / "run" / "checkpoint-30" / "trainer_state.json").read_text())
    found["saved"] = state["stateful_callbacks"]["SimilarityStop"]["attributes"]
    found["resumed"], _ = train(folder / "run", batch, threshold, str(folder / "run" / "checkpoint-30"))
    return found


def train(
    folder: Path, batch: str, threshold: float, checkpoint: str | None = None
) -> tuple[dict[str, Any], list[float]]:
    """One run, and the mean similarity of this rank at each step."""
    data = {"train_dataset": token_rows(64), "similarity_batch": batch, "guidance_stop_similarity": threshold}
    trainer = make_trainer(folder, gpt2(seed=3 if checkpoint else 0), llama(), **RUN, **data)
    stop = stop_among(trainer.callback_handler.callbacks)
    assert stop is not None
    saw: list[float] = []
    note = stop.note

    def noting(similarities: Any, rows: int) -> None:
        saw.append(statistics.fmean(value.item() for value in similarities))
        note(similarities, rows)

    stop.note = noting  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=checkpoint)
    return {"stopped at": stop.stopped_at, "weights": weights(trainer.model)}, saw


if __name__ == "__main__":
    main(Path(sys.argv[1]))
