"""Trains tiny networks on each of several processes and writes what every rank saw; `test_processes.py` judges.

torchrun --standalone --nproc_per_node 2 tests/scripts/two_processes.py <folder> --use_cpu
"""

from __future__ import annotations

import gc
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from builders import NormNet, arguments, gpt2, gradients, guidance_by_hand, linear, llama, seeded, token_rows
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from hf_guidance import GuidanceTrainer
from hf_guidance.tasks.images import count_skipped

SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
UNEVEN = {"even_batches": False, "dispatch_batches": False}  # the last batch has 4 rows on rank 0 and 2 on rank 1


def main(folder: Path) -> None:
    gc.freeze()  # Trainer collects garbage at every start
    seen: dict[str, Any] = {"by hand": losses_and_gradients_by_hand(folder)}
    seen["trained"] = train(folder, gpt2(), llama())
    seen["own base"] = train(folder, adapted(), "base", **SGD)
    seen["copied base"] = train(folder, adapted(), gpt2(dropout=0.2), **SGD)
    seen["without a look"] = train(folder, gpt2(dropout=0.2), llama(), looks=False)
    seen["with a look"] = train(folder, gpt2(dropout=0.2), llama())
    seen["uneven"] = train(
        folder, gpt2(), llama(), rows=22, max_steps=-1, num_train_epochs=1, accelerator_config=UNEVEN
    )
    seen["stopped"] = train(folder, gpt2(), llama(), guidance=linear(guidance_stop_step=1))
    seen["unguided"] = train(folder, gpt2(), None)
    seen["plain"] = logs_of(Trainer(gpt2(), distributed(folder), train_dataset=token_rows(32)))
    seen["prealigned"] = train(folder, gpt2(), llama(), guidance=linear(prealign_steps=3))
    seen["noise"] = train(folder, gpt2(), llama(), guidance=linear(guide_input="noise"))
    config = linear(guide_layers=["out"], guide_batch_norm="calibrated", calibration_batches=2)
    seen["calibrated"] = train(folder, gpt2(), guide := NormNet(), guidance=config)
    seen["calibrated"]["statistics"] = guide.norm.running_mean
    rank = torch.distributed.get_rank()
    rows = SimpleNamespace(decode=SimpleNamespace(skipped=3 + rank))
    none = SimpleNamespace(decode=SimpleNamespace(skipped=0))
    task: Any = SimpleNamespace(train_dataset=rows, eval_dataset=none, test_dataset=none)
    seen["skipped images"] = count_skipped(task)
    torch.save(seen, folder / f"rank{rank}.pt.part")
    (folder / f"rank{rank}.pt.part").rename(folder / f"rank{rank}.pt")
    torch.distributed.barrier()


def adapted() -> nn.Module:
    config = LoraConfig(target_modules=["c_attn"], r=2, lora_dropout=0.2, init_lora_weights=False, fan_in_fan_out=True)
    return seeded(lambda: get_peft_model(gpt2(dropout=0.2), config), 0)


def distributed(folder: Path, **changes: Any) -> Any:
    assert "--use_cpu" in sys.argv
    return arguments(folder, ddp_find_unused_parameters=False, **changes)


def train(
    folder: Path,
    target: nn.Module,
    guide: nn.Module | Literal["base"] | None,
    guidance: Any = None,
    rows: int = 32,
    looks: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    trainer = GuidanceTrainer(
        model=target,
        guide=guide,
        guidance=guidance,
        args=distributed(folder, **changes),
        train_dataset=token_rows(rows),
    )
    guide = trainer.guide
    before = None if guide is None else [value.clone() for value in guide.parameters()]
    seen: dict[str, Any] = {"target saw": record_ids(target), "guide saw": record_ids(guide or nn.Module())}
    trainer.takes_first_look = looks
    with redirect_stdout(StringIO()) as printed:
        seen |= logs_of(trainer)
    seen["looks printed"] = printed.getvalue().count("Guidance on the first batch")
    seen["is wrapped"] = isinstance(trainer.model_wrapped, DistributedDataParallel)
    if guide is not None:
        seen["guide is as before"] = all(map(torch.equal, before, guide.parameters()))
        of_guide = {id(parameter) for parameter in guide.parameters()}
        seen["guide is wrapped"] = any(id(parameter) in of_guide for parameter in trainer.model_wrapped.parameters())
    return seen


def record_ids(network: nn.Module) -> list[torch.Tensor]:
    ids: list[torch.Tensor] = []
    network.register_forward_pre_hook(lambda module, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True)
    return ids


def logs_of(trainer: Trainer) -> dict[str, Any]:
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {"logs": logs, "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()}}


def losses_and_gradients_by_hand(folder: Path) -> dict[str, Any]:
    """One optimizer step of two micro-steps under DDP, and what this rank makes of the same batches by itself."""
    target, copy, guide, batches = gpt2(), gpt2(), llama(), []

    # the look at the first batch runs it in evaluation mode
    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.training:
            batches.append(dict(kwargs))

    target.register_forward_pre_hook(keep, with_kwargs=True)
    config = linear(guidance_weight=0.7)
    seen = train(folder, target, guide, guidance=config, rows=16, max_steps=1, gradient_accumulation_steps=2, **SGD)
    batches = [{name: batch[name] for name in ("input_ids", "labels")} for batch in batches]
    task = [copy(**batch).loss for batch in batches]
    guidance = [guidance_by_hand(copy, guide, batch) for batch in batches]
    own = sum(task) / 2 + 0.7 * sum(guidance) / 2
    return seen | {
        "own task": [loss.item() for loss in task],
        "own guidance": [loss.item() for loss in guidance],
        "own gradient": gradients(copy, own),
        "before": [parameter.detach().clone() for parameter in copy.parameters()],
        "after": [parameter.detach().clone() for parameter in target.parameters()],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
