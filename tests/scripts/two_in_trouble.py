"""Two processes, of which one is in trouble, late, or has half of the target; `test_trouble.py` judges what they write.

torchrun --standalone --nproc_per_node 2 tests/scripts/two_in_trouble.py <folder> --use_cpu
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from builders import gpt2, llama, token_batch
from safetensors.torch import load_file
from torch import nn
from torch.distributed import get_rank
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from trainers import make_trainer, weights
from transformers import TrainerState, XLNetConfig, XLNetModel

from hf_guidance import GuidanceConfig, GuidanceLoss
from hf_guidance.features.distributed import runs_alone
from hf_guidance.guide.identity import fingerprint

GLOO = {"ddp_find_unused_parameters": False}


def main(folder: Path) -> None:
    gc.freeze()  # Trainer collects garbage at every start
    seen = {action: not_finite(folder, action) for action in ("stop", "skip")}
    seen["late"] = late(folder / "late")
    seen["sharded"] = sharded()
    seen["sharded guide"] = {kind: sharded_guide(folder / kind, kind) for kind in ("whole", "shared")}
    seen["sequence-first"] = {kind: sequence_first(kind) for kind in ("whole", "sharded")}
    seen["FSDP 1 runs alone"] = runs_alone(FullyShardedDataParallel(gpt2(), device_id=torch.device("cpu")).module)
    rank = get_rank()
    torch.save(seen, folder / f"rank{rank}.pt.part")
    (folder / f"rank{rank}.pt.part").rename(folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def not_finite(folder: Path, action: str) -> dict[str, Any]:
    """The second step's similarity is not a number, on the second rank alone."""
    guide, error = llama(), ""
    trainer = make_trainer(folder, gpt2(), guide, on_non_finite=action, looks=False, **GLOO)
    count = iter(range(100))

    def spoil(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if next(count) == 1 and get_rank() == 1 else output

    guide.layers[2].register_forward_hook(spoil)
    try:
        trainer.train()
    except FloatingPointError as caught:
        error = str(caught)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {"error": error, "logs": logs, "weights": weights(trainer.model), "steps": trainer.state.global_step}


def late(folder: Path) -> dict[str, Any]:
    """The second rank is late to write its random state: was it there when the first wrote the trainer's state?"""
    trainer = make_trainer(folder, gpt2(), llama(), save_strategy="steps", save_steps=1, max_steps=1, **GLOO)
    save, there = TrainerState.save_to_json, []

    def look_and_save(state: TrainerState, path: str) -> None:
        there.append((Path(path).parent / "rng_state_1.pth").is_file())
        save(state, path)

    TrainerState.save_to_json = look_and_save
    if get_rank() == 1:
        write = torch.save

        def slowly(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            time.sleep(2 if "rng_state_1" in str(path) else 0)
            write(content, path, *args, **kwargs)

        torch.save = slowly
    trainer.train()
    TrainerState.save_to_json = save
    if get_rank() == 1:
        torch.save = write
    return {"was there": there}


def sharded() -> dict[str, Any]:
    """Each rank on its own batch: the guidance of a target under `fully_shard` beside that of the same one whole."""
    whole, half, guide, batch = gpt2(), gpt2(), llama(), token_batch(seed=get_rank())
    mesh = init_device_mesh("cpu", (2,))
    for block in half.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(half, mesh=mesh)
    seen: dict[str, Any] = {}
    for name, target in (("whole", whole), ("sharded", half)):
        loss = GuidanceLoss(target, guide)
        with loss.watch(batch) as watched:
            outputs = target(**watched.inputs)
        watched.total(outputs.loss).backward()
        gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in target.parameters()]
        if name == "whole":  # the mean over the ranks, as `fully_shard` takes it
            for gradient in gradients:
                torch.distributed.all_reduce(gradient)
                gradient /= torch.distributed.get_world_size()
        seen[name] = {
            "loss": watched.loss.item(),
            "gradients": gradients,
            "is sharded": [isinstance(p, DTensor) for p in target.parameters()],
        }
    seen["guide is sharded"] = any(isinstance(p, DTensor) for p in guide.parameters())
    return seen


def sharded_guide(folder: Path, kind: str) -> dict[str, Any]:
    """A run whose guide is whole on each rank, or shared between them."""
    options = {"shard_guide": kind == "shared", "save_guide": True, "max_steps": 3}
    trainer = make_trainer(folder, gpt2(), llama(), **options, **GLOO)
    layers = [parameter for name, parameter in trainer.guide.named_parameters() if "layers." in name]
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    losses = [{name: value for name, value in log.items() if "loss" in name or "similarity" in name} for log in logs]
    saved = load_file(folder / "guide" / "model.safetensors")
    return {
        "losses": losses,
        "weights": weights(trainer.model),
        "held": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in layers),
        "saved": {name: tensor for name, tensor in saved.items() if "layers." in name},
        "fingerprint": fingerprint(trainer.guide),
        "identity": trainer.guide_identity["fingerprint"],
    }


def sequence_first(kind: str) -> dict[str, Any]:
    """A guide with the positions on its first axis, which are as many as the rows on the second rank alone."""
    guide = XLNetModel(XLNetConfig(vocab_size=17, d_model=8, n_layer=2, n_head=2, d_inner=16))
    if kind == "sharded":
        for block in guide.layer:
            fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    rows = 6 if kind == "sharded" else 5 + get_rank()
    ids = torch.randint(17, (rows, 6), generator=torch.Generator().manual_seed(0))
    target, warned, error = gpt2(), StringIO(), ""
    handler = logging.StreamHandler(warned)
    logging.getLogger("hf_guidance").addHandler(handler)
    loss = GuidanceLoss(target, guide, GuidanceConfig(guide_layers=["layer.*"], guide_shares_tokenizer=True))
    try:
        with loss.watch({"input_ids": ids}) as watched:
            target(**watched.inputs)
    except ValueError as caught:
        error = str(caught)
    logging.getLogger("hf_guidance").removeHandler(handler)
    return {"error": error, "warned": warned.getvalue(), "alone": runs_alone(guide)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
