"""`hf-guidance compare`: two networks over a dataset, to a table, a JSON file and a figure."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from hf_guidance.analysis.comparison_values import SAMPLE_WORDS, Comparison
from hf_guidance.analysis.network_comparison import compare
from hf_guidance.commands.data import add_flags, check_flags, read
from hf_guidance.commands.networks import check_colours, check_same_kind, kind_of, load
from hf_guidance.guide.forward import accepted_columns
from hf_guidance.similarity.registry import MEASURES, get_measure
from hf_guidance.trainer.checks import check_writable

MOST_COLUMNS = 8  # of the printed table


def add_command(commands: Any) -> None:
    """Add the command and its flags to a parser."""
    parser = commands.add_parser("compare", help="similarity of all layers of two networks over a dataset")
    parser.add_argument("a", help="Hub id, folder, or timm/<architecture>")
    parser.add_argument("b", help="the other one")
    add_flags(parser)
    parser.add_argument("--untrained_a", type=int, metavar="SEED", help="random weights for a, drawn with this seed")
    parser.add_argument("--untrained_b", type=int, metavar="SEED", help="random weights for b")
    parser.add_argument("--measure", default="debiased_cka", help=f"one of {', '.join(MEASURES)}")
    parser.add_argument("--layers_a", nargs="+", help="layers of a: hidden_states, names, globs or types")
    parser.add_argument("--layers_b", nargs="+", help="layers of b")
    parser.add_argument("--sample_axis", default="sequence", choices=list(SAMPLE_WORDS), help="what a sample is")
    parser.add_argument("--samples", type=int, help="most rows to compare; by default all")
    parser.add_argument("--feature_layout", default="auto", help="channels_first or channels_last, for maps of images")
    parser.add_argument("--device", help="such as cuda; by default the CPU")
    parser.add_argument("--output", default="comparison", help="path without suffix of the JSON file and the figure")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    """Compare two networks; write the numbers before the figure."""
    place = Path(given.output.removesuffix(".json").removesuffix(".png"))
    get_measure(given.measure)
    check_writable(place.parent, "--output")
    check_flags(given)
    seeds = given.untrained_a, given.untrained_b
    names = given.a, given.b
    networks = [load(name, seed) for name, seed in zip(names, seeds, strict=True)]
    kinds = [kind_of(network, name) for network, name in zip(networks, names, strict=True)]
    check_same_kind(names, kinds)
    for name, network in zip(names, networks, strict=True) if kinds[0] == "images" else ():
        check_colours(network, name)
    decodes = any("decoder_input_ids" in accepted_columns(network) for network in networks)
    data = read(given, kinds[0], names, seeds, decodes=decodes)
    found = compare(
        networks[0],
        networks[1],
        data.rows,
        measure=given.measure,
        layers_a=given.layers_a,
        layers_b=given.layers_b,
        sample_axis=given.sample_axis,
        samples=given.samples,
        batch_size=given.batch_size,
        collator=data.collator,
        feature_layout=given.feature_layout,
        device=given.device,
    )
    print(table_of(found), flush=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    found.save(f"{place}.json")
    print(f"{place}.json", flush=True)
    found.plot(f"{place}.png", names=names)
    print(f"{place}.png")


def table_of(found: Comparison) -> str:
    """Write a comparison for the terminal: its map, or for many layers the best counterpart of each."""
    said = f"{found.measure}, {found.samples} samples ({found.sample_axis}) in {found.batches} batches"
    if found.errors is not None:
        said += f", standard error at most {np.nanmax(found.errors):.3f}"
    if len(found.layers_b) <= MOST_COLUMNS:
        heads = found.layers_b
        width = max(6, *map(len, heads))
        left = max(map(len, found.layers_a))
        lines = [" " * left + "  " + " ".join(head.rjust(width) for head in heads)]
        for name, row in zip(found.layers_a, found.values, strict=True):
            lines.append(f"{name.ljust(left)}  " + " ".join(f"{value:.3f}".rjust(width) for value in row))
        return "\n".join([said, "", *lines, ""])
    best = [int(np.nanargmax(row)) if np.isfinite(row).any() else None for row in found.values]
    pairs = [
        f"{name} ~ {found.layers_b[place]}  {row[place]:.3f}" if place is not None else f"{name} is constant"
        for name, row, place in zip(found.layers_a, found.values, best, strict=True)
    ]
    return "\n".join([said, "", "most similar layer of b, of each of a:", *pairs, ""])
