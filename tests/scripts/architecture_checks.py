"""Three guided steps of a network in a role, and checks of it that need no reference."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from small_networks import ROWS, Case, loss_of, partner_for
from torch import Tensor, nn

from hf_guidance import GuidanceConfig, GuidanceLoss
from hf_guidance.features.conventions import Conventions
from hf_guidance.features.hidden_states import first_tensor
from hf_guidance.features.reader import LayerReader
from hf_guidance.features.samples import Samples
from hf_guidance.guide.forward import accepted_columns

TOLERANCE = 1e-4
MORE = 4  # columns of padding
OWN_CHOICE = ("Timm", "MaskFormer", "Sam3LiteText", "TimesFm2_5")  # classes that return states of some of their blocks


class Wrong(Exception):
    """Finding of a check."""


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
    return bool((features - features.mean(0)).norm() <= max(1e-6 * float(features.norm()), 1e-18))


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


def _own_outputs_agree(
    case: Case, batches: list[dict[str, Any]], order: Tensor | None, seeds: tuple[int, int] = (0, 0)
) -> bool:
    """Tell whether the blocks of a network give the same for the rows of two batches."""
    try:
        outputs = [
            [run.output for run in run_blocks(case.network, batch, seed)]
            for batch, seed in zip(batches, seeds, strict=True)
        ]
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
    return _own_outputs_agree(case, [case.batch, case.batch], None, seeds=(0, 1))


class Block(NamedTuple):
    """One run of a module of a list: its name, the list's, its output and its input."""

    name: str
    stack: str
    output: Tensor
    given: Tensor | None


def run_blocks(network: nn.Module, batch: dict[str, Any], seed: int = 0) -> list[Block]:
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
    torch.backends.mha.set_fastpath_enabled(False)  # whose tensors are nested
    try:
        with torch.no_grad():
            torch.manual_seed(seed)
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
    own_choice = any(name in type(case.network).__name__ for name in OWN_CHOICE)
    if said != "right" and own_choice:  # which stages of which of its parts they are is the choice of the network
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
    all_but_the_last = len(values) == len(runs) - 1 and all(map(_equal, values, (run.output for run in runs)))
    if right or all_but_the_last or len(values) == 1:  # PatchTST returns no state of its last block
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
    conventions = Conventions(case.network, dict(case.network.named_modules()))
    samples = Samples(case.batch, "token", conventions=conventions)
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
