"""Cost of comparing two networks: two untrained ResNet-50, 16 blocks each, beside their two forwards.

    python tests/scripts/comparing.py [--images 2000] [--size 64] [--rounds 3]

Prints the CPU time of `compare` over that of the forwards alone on one thread, and the growth of memory with the number
of images.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import torch
from torch import Tensor, nn

from hf_guidance import load_guide
from hf_guidance.analysis import compare

BLOCKS = ["Bottleneck"]


class Images:
    """Random images, made when they are read."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= self.count:
            raise IndexError(index)
        return {"pixel_values": torch.randn(3, self.size, self.size, generator=torch.Generator().manual_seed(index))}


def seconds_of_forwards(networks: list[nn.Module], rows: Images) -> float:
    """Run both networks over the images as `compare` batches them."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    began = time.process_time()
    with torch.no_grad():
        for start in range(0, len(order), 32):
            batch = torch.stack([rows[i]["pixel_values"] for i in order[start : start + 32]])
            for network in networks:
                network(pixel_values=batch)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    networks = [load_guide("timm/resnet50", untrained=True, seed=seed).eval() for seed in (0, 1)]
    peaks, ratios = [], []
    for count in (given.images // 4, *[given.images] * given.rounds):
        rows = Images(count, given.size)
        plain = seconds_of_forwards(networks, rows)
        began = time.process_time()
        found = compare(*networks, rows, layers_a=BLOCKS, layers_b=BLOCKS)
        taken = time.process_time() - began
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
        print(
            f"{count} images, {found.values.shape}: {taken:.1f} s, forwards {plain:.1f} s, {taken / plain:.2f}",
            flush=True,
        )
        if count == given.images:
            ratios.append(taken / plain)
    spread = f" ± {statistics.stdev(ratios):.2f}" if len(ratios) > 1 else ""
    print(f"ratio {statistics.fmean(ratios):.2f}{spread}; peak memory {peaks[0]:.0f} MiB, then {peaks[-1]:.0f} MiB")


if __name__ == "__main__":
    main()
