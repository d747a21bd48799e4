"""Evaluates similarities on each of several processes and writes what every rank saw; `test_evaluation.py` judges.

torchrun --standalone --nproc_per_node 2 tests/scripts/two_evaluations.py <folder> --use_cpu
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch
from builders import gpt2, llama, token_rows
from trainers import make_trainer

UNEVEN = {"even_batches": False, "dispatch_batches": False}
ROWS = 15  # in batches of 4 and 4, then of 4 and 3


def main(folder: Path) -> None:
    assert "--use_cpu" in sys.argv
    gc.freeze()  # Trainer collects garbage at every start
    seen = {batch: evaluate(folder, batch) for batch in ("local", "global")}
    rank = torch.distributed.get_rank()
    torch.save(seen, folder / f"rank{rank}.pt.part")
    (folder / f"rank{rank}.pt.part").rename(folder / f"rank{rank}.pt")
    torch.distributed.barrier()


def evaluate(folder: Path, batch: str) -> dict[str, Any]:
    target = gpt2(dropout=0.3)
    ids: list[torch.Tensor] = []
    target.register_forward_pre_hook(lambda module, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True)
    trainer = make_trainer(
        folder,
        target,
        llama(),
        measure="linear_cka",
        eval_similarity=True,
        similarity_batch=batch,
        eval_dataset=token_rows(ROWS, seed=2),
        per_device_eval_batch_size=4,
        accelerator_config=UNEVEN,
    )
    metrics = trainer.evaluate()
    return {"metrics": metrics, "saw": ids[::2]}  # each batch is forwarded twice


if __name__ == "__main__":
    main(Path(sys.argv[1]))
