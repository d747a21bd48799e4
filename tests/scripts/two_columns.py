"""Trains a guided sentence-transformers model on each of two processes; `test_sentence_transformers.py` judges.

torchrun --standalone --nproc_per_node 2 tests/scripts/two_columns.py <networks> <folder> --use_cpu
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from test_sentence_transformers import make, network
from trainers import train_logs, weights

from hf_guidance import load_guide


def main(networks: Path, folder: Path) -> None:
    rank = os.environ["RANK"]
    trainer = make(folder / "run", network(networks / "dropping"), load_guide(networks / "guide"), max_steps=2)
    trainer.train()
    seen = {"weights": weights(trainer.model), "guidance": [log["guidance/loss"] for log in train_logs(trainer)]}
    torch.save(seen | {"wrapper": type(trainer.model_wrapped).__name__}, folder / f"rank{rank}.part")
    (folder / f"rank{rank}.part").rename(folder / f"rank{rank}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
