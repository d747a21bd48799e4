"""Ablation of the fast paths of a layer: the guidance term alone, on stored features, with and without each, in turns.

    python tests/scripts/ablation.py [rounds]

Behind it, the term with debiased CKA over that with linear CKA.

The features have the sizes of the rows of `recipes/guidance_cost.py`. The term is the layers, the measure and the
backward of the loss. On a CPU times are CPU times on one thread, on a GPU times between CUDA events.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from hf_guidance.mapping import Pair
from hf_guidance.similarity.layers import layer_of
from hf_guidance.similarity.pair_loss import guidance_loss
from hf_guidance.similarity.registry import get_measure
from hf_guidance.trainer.steps import Clock

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = DEVICE.type == "cuda"
PATHS = {  # name → what is replaced to do without it
    "numpy's half products": [
        (f"hf_guidance.similarity.{m}.for_numpy", lambda x: False) for m in ("matrices", "layers")
    ],
    "means left in": [("hf_guidance.similarity.matrices.SAFE_OFFSET", -1)],
    "tensor cores": [("hf_guidance.similarity.half_precision.for_tensor_cores", lambda x, in_region=False: False)],
}
PATHS = {"tensor cores": PATHS["tensor cores"]} if HALF else {n: PATHS[n] for n in list(PATHS)[:2]}


def convolutions(size: int) -> list[int]:
    """Return the numbers of features of a ResNet-18's convolutions on images of a size."""
    sides = [size // 2] + [size // 4] * 4
    widths = [64] * 5
    for i, width in enumerate((128, 256, 512)):
        sides += [size // (8 * 2**i)] * 5
        widths += [width] * 5
    return [width * side**2 for width, side in zip(widths, sides, strict=True)]


def rows() -> Iterator[tuple[str, str, int, list[int], list[int]]]:
    """Yield name, measure, samples, and the features of target and guide layers."""
    for n, size, width in ((64, 64, 512), (128, 64, 1024), (256, 32, 256), (64, 112, 1024)):
        yield f"{n}/{size}/{width}", "linear_cka", n, [width] * 20, convolutions(size)
    for width, guide in ((64, 128), (256, 256), (256, 128)):
        for measure in ("linear_cka", "ridge"):
            yield f"1024 tokens/{width}/{guide}", measure, 1024, [width] * 4, [guide] * 4


def term(pairs: list[Pair], measure: str, targets: dict[str, Tensor], guides: dict[str, Tensor]) -> None:
    """Compute the guidance term and its gradient."""
    below = get_measure(measure).primal_below
    with torch.no_grad():
        theirs = {name: layer_of(x, primal_below=below) for name, x in guides.items()}
    ours = {name: layer_of(x, primal_below=below) for name, x in targets.items()}
    guidance_loss(pairs, get_measure(measure), ours, theirs)[0].backward()


def seconds(work: Callable[[], None], clock: Clock) -> float:
    began = clock.now()
    work()
    return clock.between(began, clock.now())


def in_turns(one: Callable[[], None], other: Callable[[], None], rounds: int) -> tuple[list[float], list[float]]:
    """Time two pieces of work by turns, after a first round that does not count."""
    clock = Clock(DEVICE)
    found = [(seconds(one, clock), seconds(other, clock)) for _ in range(rounds + 1)][1:]
    return [times for times, _ in found], [times for _, times in found]


def features(n: int, widths: list[int], guide_widths: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw features of target and guide layers."""
    dtype = torch.bfloat16 if HALF else torch.float32
    targets = {f"t{i}": torch.randn(n, d).relu().to(DEVICE, dtype).requires_grad_() for i, d in enumerate(widths)}
    return targets, {f"g{i}": torch.randn(n, d).relu().to(DEVICE, dtype) for i, d in enumerate(guide_widths)}


def error_of(values: list[float]) -> float:
    """Return the standard error of a mean."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def main() -> None:
    rounds = int((sys.argv[1:] or ["50"])[0])
    torch.set_num_threads(1)
    for name, measure, n, widths, guide_widths in rows():
        targets, guides = features(n, widths, guide_widths)
        pairs = list(zip(targets, guides, strict=True))
        work = partial(term, pairs, measure, targets, guides)
        for path, replaced in PATHS.items():

            def without(replaced: list[tuple[str, Any]] = replaced, work: Callable[[], None] = work) -> None:
                with ExitStack() as stack:
                    for place, value in replaced:
                        stack.enter_context(patch(place, value))
                    work()

            found, plain = in_turns(work, without, rounds)
            saved = [b - a for a, b in zip(found, plain, strict=True)]
            print(
                f"{name:22} {measure:12} {path:22} {1e3 * statistics.median(found):7.2f} ms, without "
                f"{1e3 * statistics.median(plain):7.2f} ms: saves {1e3 * statistics.median(saved):6.2f} ± "
                f"{1e3 * error_of(saved):.2f} ms, {statistics.median(saved) / statistics.median(plain):.0%}",
                flush=True,
            )
    for name, _, n, widths, guide_widths in (row for row in rows() if row[1] == "linear_cka"):
        targets, guides = features(n, widths, guide_widths)
        pairs = list(zip(targets, guides, strict=True))
        linear, debiased = (partial(term, pairs, name, targets, guides) for name in ("linear_cka", "debiased_cka"))
        found, more = in_turns(linear, debiased, rounds)
        ratios = [b / a for a, b in zip(found, more, strict=True)]
        print(
            f"{name:22} linear CKA {1e3 * statistics.median(found):.2f} ms, debiased CKA "
            f"{statistics.median(ratios):.2f} ± {error_of(ratios):.2f} times that",
            flush=True,
        )


if __name__ == "__main__":
    main()
