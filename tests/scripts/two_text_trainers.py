"""Trains with TRL's Trainers on each of several processes; `test_other_trainers.py` judges what they write.

torchrun --standalone --nproc_per_node 2 tests/scripts/two_text_trainers.py <folder> --use_cpu
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from builders import arguments, t5, token_rows
from text_trainers import TRAINERS, Case, make, model_of
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_guidance import GuidanceMixin


class GuidedSeq2Seq(GuidanceMixin, Seq2SeqTrainer):
    pass


def main(folder: Path) -> None:
    assert "--use_cpu" in sys.argv
    dist.init_process_group("gloo")
    rank, seen = dist.get_rank(), {}
    if rank == 0:
        for name in TRAINERS:
            model_of(Case(name), folder)
    dist.barrier()
    few = {"max_steps": 2, "per_device_train_batch_size": 4, "ddp_find_unused_parameters": False}
    args = Seq2SeqTrainingArguments(**{**arguments(folder).to_dict(), **few})
    trainers = {"Seq2Seq": GuidedSeq2Seq(t5(), args, train_dataset=token_rows(), guide=t5(seed=1))}
    for name in ("Seq2Seq", *TRAINERS):
        trainer = trainers.get(name) or make(Case(name), folder, **few)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        weights = [float(value.double().sum()) for value in trainer.model.state_dict().values()]
        seen[name] = {"logs": logs, "weights": weights, "wrapper": type(trainer.model_wrapped).__name__}
    (folder / f"rank{rank}.part").write_text(json.dumps(seen))
    (folder / f"rank{rank}.part").rename(folder / f"rank{rank}.json")
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
