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
import copy
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from small_networks import FAMILIES, ROWS, Case, case_named, loss_of, names_of, partner_for

from hf_guidance import GuidanceConfig, GuidanceLoss
from hf_guidance.features.reader import LayerReader, first_tensor
from hf_guidance.features.samples import Samples
from hf_guidance.guide.inputs import accepted_columns

ROLES = ("target", "guide")
SECONDS = 60  # for one network in both roles
TOLERANCE = 1e-4
HIDDEN = ("hidden_states", "decoder_hidden_states")
MORE = 4  # columns of padding


class Wrong(Exception):
    """What a check found."""


# ------------------------------------------------------------------------------------------------------------- steps


def sides(case: Case, role: str) -> tuple[nn.Module, nn.Module, dict[str, Any], GuidanceConfig]:
    """Return target, guide, a batch for both and the settings, with the network in a role."""
    partner = partner_for(case)
    if role == "guide":
        case = with_decoder(case)
    network, other = copy.deepcopy(case.network), partner.network
    shapes = {name: column.shape for name, column in case.batch.items() if isinstance(column, Tensor)}
    shared = all(shapes.get(name) == column.shape for name, column in partner.batch.items() if name != "labels")
    target, guide = (network, other) if role == "target" else (other, network)
    given, others = (case, partner) if role == "target" else (partner, case)
    batch = dict(given.batch)
    if not (shared and set(others.batch) - {"labels"} <= set(batch)):
        batch |= {f"guide_{name}": value for name, value in others.batch.items() if name != "labels"}
    return (
        target,
        guide,
        batch,
        GuidanceConfig(target_layers=list(given.layers), guide_layers=list(others.layers), **case.settings),
    )


def with_decoder(case: Case) -> Case:
    """Return an encoder-decoder with the decoder's input in its batch, which as a guide it cannot make from labels."""
    name = "decoder_input_ids"
    if "labels" not in case.batch or name in case.batch or name not in accepted_columns(case.network):
        return case
    return replace(case, batch={**case.batch, name: case.batch["labels"].clamp(min=0)})


def train(case: Case, role: str) -> None:
    """Take three guided steps, and check loss, gradient and the frozen guide."""
    target, guide, batch, config = sides(case, role)
    target.train()
    guidance = GuidanceLoss(target, guide, config)
    before = {name: value.clone() for name, value in _state(guide)}
    weights = [p for p in target.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-3)
    for step in range(3):
        with guidance.watch(batch, step=step) as watched:
            output = target(**watched.inputs)
        if watched.loss is None:
            raise Wrong(f"not guided: {watched.why_unguided}")
        if not watched.loss.isfinite():
            raise Wrong(f"the loss is {float(watched.loss)}")
        if step == 0:
            slopes = torch.autograd.grad(watched.loss, weights, retain_graph=True, allow_unused=True)
            reached = any(slope is not None and slope.count_nonzero() for slope in slopes)
            if not reached and any(
                similarity for similarity in watched.similarities[guidance.measures[0].name].values()
            ):
                raise Wrong("the guidance loss has no gradient in any weight")  # similarities of dead layers are 0
        optimizer.zero_grad()
        watched.total(loss_of(output)).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    changed = [name for name, value in _state(guide) if not _same_bits(value, before[name])]
    if changed:
        raise Wrong(f"the guide's {changed[:3]} changed")


def _state(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()


def _same_bits(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one.nan_to_num(), two.nan_to_num())


# ------------------------------------------------------------------------------------------------------------ checks


def like_itself(case: Case, role: str) -> str:
    """Check that a network and its copy have similarity 1 in every pair of layers."""
    if not _repeats(case):
        return "the network is random"
    network, other = copy.deepcopy(case.network).eval(), copy.deepcopy(case.network)
    layers, case = list(case.layers), with_decoder(case)
    guidance = GuidanceLoss(
        network, other, GuidanceConfig(measure="linear_cka", target_layers=layers, guide_layers=layers)
    )
    with guidance.watch(case.batch) as watched:
        network(**watched.inputs)
    values = {name: round(float(value), 5) for name, value in watched.similarities["linear_cka"].items()}
    dead = {name for name, value in layers_of(case).items() if _is_dead(value.float())}
    low = {n: v for n, v in values.items() if not v >= 0.999 and n.partition("~")[0] not in dead}
    if low:
        raise Wrong(f"unlike its copy: {low}")
    return "right"


def _is_dead(features: Tensor) -> bool:
    return bool(features.std(0).max() <= max(1e-6 * float(features.abs().mean()), 1e-18))


def order_of_rows(case: Case, role: str) -> str:
    """Check that rows in another order give the same loss."""
    order = torch.arange(ROWS).roll(2)
    return _same_loss(case, role, lambda column, name: column[order] if len(column) == ROWS else column, order)


def padding(case: Case, role: str) -> str:
    """Check that columns of padding change nothing."""
    if "attention_mask" not in case.batch or case.kind != "text":
        return "no mask"
    length, target = case.batch["input_ids"].shape[1], sides(case, role)[0]

    def pad(column: Tensor, name: str) -> Tensor:
        if column.ndim < 2 or column.shape[1] != length or name.removeprefix("guide_").startswith(("decoder", "pixel")):
            return column
        if name == "labels" and _is_encoder_decoder(target):
            return column
        more = column[:, -1:].expand(-1, MORE, *column.shape[2:]).clone()
        more = more * 0 + {"labels": -100}.get(name, 0 if "mask" in name else 7 if "ids" in name else 0)
        return torch.cat([column, more], 1)

    return _same_loss(case, role, pad, None)


def padding_of_labels(case: Case, role: str) -> str:
    """Check that padding of an encoder-decoder's labels changes nothing."""
    if role != "target" or "labels" not in case.batch or not _is_encoder_decoder(case.network):
        return "no decoder"

    def pad(column: Tensor, name: str) -> Tensor:
        return torch.cat([column, column.new_full((ROWS, MORE), -100)], 1) if name == "labels" else column

    return _same_loss(case, role, pad, None)


def _is_encoder_decoder(network: nn.Module) -> bool:
    return bool(getattr(getattr(network, "config", None), "is_encoder_decoder", False))


def _same_loss(case: Case, role: str, change: Callable[[Tensor, str], Tensor], order: Tensor | None) -> str:
    target, guide, batch, config = sides(case, role)
    case = with_decoder(case) if role == "guide" else case
    target.eval()
    other = {name: change(value, name) if isinstance(value, Tensor) else value for name, value in batch.items()}
    if all(value is other[name] for name, value in batch.items()):
        return "nothing to change"
    prefix = "" if role == "target" else "guide_"
    names = [name for name in case.batch if name != "labels" or role == "target"]
    own = [{name: given.get(prefix + name, given.get(name)) for name in names} for given in (batch, other)]
    if not _own_outputs_agree(case, own, order):
        return "the network's own outputs change"
    losses: list[float] = []
    for given in (batch, other):
        guidance = GuidanceLoss(target, guide, config)
        torch.manual_seed(0)
        with guidance.watch(given) as watched:
            target(**watched.inputs)
        guidance.close()
        if watched.loss is None:
            raise Wrong(f"not guided: {watched.why_unguided}")
        losses.append(float(watched.loss.detach()))
    if abs(losses[0] - losses[1]) > TOLERANCE * max(1, abs(losses[0])):
        raise Wrong(f"the loss was {losses[0]:.6f} and is {losses[1]:.6f}")
    return "right"


def _own_outputs_agree(case: Case, batches: list[dict[str, Any]], order: Tensor | None) -> bool:
    """Tell whether the blocks of a network give the same for the rows of two batches."""
    try:
        outputs = [[run.output for run in run_blocks(case.network, batch)] for batch in batches]
    except Exception:  # it does not take the second batch
        return False
    if len(outputs[0]) != len(outputs[1]):
        return False
    for one, two in zip(*outputs, strict=True):
        if order is not None:
            one = one[order] if len(one) == ROWS else one
        if one.shape != two.shape:
            if one.ndim != two.ndim or one.shape[0] != two.shape[0] or one.ndim < 3:
                return False
            two = two[:, : one.shape[1]]
        if one.shape != two.shape or not torch.allclose(one, two, atol=1e-5, rtol=1e-3):
            return False
    return True


def _repeats(case: Case) -> bool:
    return _own_outputs_agree(case, [case.batch, case.batch], None)


class Block(NamedTuple):
    """One run of a module of a list: its name, the list's, its output and its input."""

    name: str
    stack: str
    output: Tensor
    given: Tensor | None


def run_blocks(network: nn.Module, batch: dict[str, Any]) -> list[Block]:
    """Run a network in evaluation mode, and return the runs of its blocks, which are the modules in lists."""
    runs: list[Block] = []
    handles = []

    def keep(name: str, stack: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            value = first_tensor(output)
            given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            if isinstance(value, Tensor):
                runs.append(
                    Block(name, stack, value.detach().clone(), None if given is None else given.detach().clone())
                )

        return hook

    for name, module in network.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for i, child in module.named_children():
                if not isinstance(child, (nn.ModuleList, nn.Identity)):
                    handles.append(child.register_forward_hook(keep(f"{name}.{i}", name), with_kwargs=True))
    mode = network.training
    network.eval()
    try:
        with torch.no_grad():
            torch.manual_seed(0)
            network(**batch)
    finally:
        network.train(mode)
        for handle in handles:
            handle.remove()
    return runs


def outputs_of_blocks(case: Case, role: str) -> str:
    """Check that the layers read are the outputs of one stack of blocks, in order, each once."""
    if case.layers != ("hidden_states",):
        return "named modules"
    blocks = run_blocks(case.network, case.batch)
    read = layers_of(case)
    said = how_read(read, blocks)
    if not blocks:
        return "hooks see no blocks"
    if said != "right" and "Timm" in type(case.network).__name__:  # which stages they are is timm's choice
        values = list(read.values())
        twice = [i for i, value in enumerate(values[1:]) if _equal(value, values[i])]
        said = f"layer {twice[0]} twice" if twice else "right"
    if said != "right":
        raise Wrong(said)
    return said


def layers_of(case: Case) -> dict[str, Tensor]:
    """Return the layers as hf_guidance reads them."""
    network = copy.deepcopy(case.network).eval()
    reader = LayerReader(network, list(case.layers), "guide")
    with torch.no_grad(), reader.reading(lambda name, value: value.detach().clone()) as read:
        torch.manual_seed(0)
        network(**case.batch)
    return dict(read)


def how_read(read: dict[str, Tensor], blocks: list[Block]) -> str:
    """Return `right` if the layers are the outputs of the blocks in order, each once, the last one maybe normed."""
    matches = {layer: [block for block in blocks if _equal(value, block.output)] for layer, value in read.items()}
    stacks: set[str] = set()
    for found in sorted(matches.values(), key=len):  # the stack that gives most layers first
        count = Counter(block.stack for others in matches.values() for block in others)
        if found and not stacks & {block.stack for block in found}:
            stacks.add(max((block.stack for block in found), key=lambda stack: (count[stack], -len(stack))))
    runs = [block for block in blocks if block.stack in stacks]
    if len(runs) > len(read):  # of several stages, each may give its last block's output
        last = {block.stack: block for block in runs}
        runs = list(last.values()) if len(last) > 1 else runs
    values = list(read.values())
    following = [block.given for block in runs[1:]] + [None]
    right = (
        len(runs) == len(values)
        and all(
            _equal(value, run.output) or (after is not None and _equal(value, after))  # some add to it before the next
            for value, run, after in list(zip(values, runs, following, strict=True))[:-1]
        )
    )
    if right or len(values) == 1:
        return "right"
    said = []
    for layer, value in read.items():
        first = [block.name for block in blocks if block.given is not None and _equal(value, block.given)]
        names = (
            [block.name for block in matches[layer] if block.stack in stacks]
            or [f"input of {name}" for name in first[:1]]
            or ["no block"]
        )
        said.append(f"{layer.rpartition('.')[2]} is {min(names, key=len)}")
    return f"{', '.join(said)}; of {len(runs)} runs of {sorted(stacks)}"


def _equal(one: Tensor, two: Tensor) -> bool:
    if two.ndim == 3 and one.ndim == 4 and 0 < (more := two.shape[1] - one.shape[2] * one.shape[3]) < 9:
        two = two[:, more:]  # timm leaves class tokens out
    if two.ndim == one.ndim == 3 and one.shape[1] < two.shape[1] and one.shape[2] == two.shape[2]:
        cut = two[:, -one.shape[1] :], two[:, : one.shape[1]]  # without a prompt, or without own padding
        return any(torch.allclose(one, part, atol=1e-5, rtol=1e-4) for part in cut)
    if one.numel() != two.numel() or one.dtype != two.dtype:
        return False
    ways = [two.reshape(one.shape)]
    if two.ndim >= 3:
        orders = ((1, -1), (-1, 1), (0, 1))
        ways += [two.movedim(*order).reshape(one.shape) for order in orders]
    return any(torch.allclose(one, way, atol=1e-5, rtol=1e-4) for way in ways)


def channels_of_maps(case: Case, role: str) -> str:
    """Check that with positions as samples the features of a square map are its channels, first or last."""
    samples = Samples(case.batch, "token")
    wrong = {}
    for name, value in layers_of(case).items():
        if (
            isinstance(value, Tensor)
            and value.ndim == 4
            and (value.shape[1] == value.shape[2]) != (value.shape[2] == value.shape[3])
        ):
            channels = value.shape[3] if value.shape[1] == value.shape[2] else value.shape[1]
            features, _ = samples.prepared(name, value)
            if features.shape[-1] != channels:
                wrong[name] = tuple(value.shape)
    if wrong:
        raise Wrong(f"channels of {wrong} are taken for positions")
    return "right"


CHECKS: tuple[Callable[[Case, str], str], ...] = (
    like_itself, order_of_rows, padding, padding_of_labels, outputs_of_blocks, channels_of_maps,
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- results


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
