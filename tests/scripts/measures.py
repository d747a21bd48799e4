"""Which measure should be the default: a small grid of measures and weights on five tasks, two seeds each.

    python tests/scripts/measures.py outputs/measures [--images zalando-datasets/fashion_mnist] [--tasks copy_paste …]
    python tests/scripts/measures.py outputs/measures --rows [--measures linear_cka …]

`outputs/shakespeare.txt` (`make shakespeare`) must exist. The folder receives `results.jsonl`, one line for each run;
the same command goes on after a stop, and at the end prints the tables of recipes/LOG.md. One seed's runs share initial
weights, data order and guide. Validation values are at the last step.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from rnn_vs_transformer import preset

from hf_guidance import GuidanceConfig, GuidanceTrainer
from hf_guidance.targets import (
    FCNConfig,
    FCNForImageClassification,
    PlainResNetConfig,
    PlainResNetForImageClassification,
)
from hf_guidance.tasks import build_task

MEASURES: dict[str, dict[str, Any]] = {  # as which a table shows fields of GuidanceConfig
    **{name: {"measure": name} for name in ("linear_cka", "debiased_cka", "ridge", "ridge_loo")},
    "ridge_loo, penalty 0.1": {"measure": "ridge_loo", "ridge_penalty": 0.1},
}
WEIGHTS = (1.0, 3.0)
SEEDS = (100, 101)
ROWS = {"all rows": 1, "a quarter of the rows": 4}
SIZES = {"embedding_size": 16, "hidden_sizes": [64, 128, 256, 512]}  # a quarter of ResNet-50's width


@dataclass(frozen=True)
class Case:
    """One task: its data, its networks and their training."""

    target: Callable[[], nn.Module]
    guide: Callable[[], nn.Module]
    rows: Any
    evaluate: Callable[[nn.Module], float]
    training: dict[str, Any]
    guidance: dict[str, Any] = field(default_factory=dict)
    guide_training: dict[str, Any] | None = None  # None: the guide stays untrained
    collator: Any = None


class Images(torch.utils.data.Dataset):
    """Decoded images `(n, 3, height, width)` and their classes."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


@cache
def fashion(source: str, train_size: int, canvas: int = 28) -> tuple[Images, Images]:
    """Return training and validation images, each at a random, fixed place of a larger canvas if one is asked for."""
    task = build_task("image_classification", dataset=source, train_size=train_size, eval_size=2000)
    splits = []
    for seed, rows in enumerate((task.train_dataset, task.eval_dataset)):
        found = task.data_collator([rows[i] for i in range(len(rows))])
        pixels = found["pixel_values"]
        random = torch.Generator().manual_seed(seed)
        places = torch.randint(canvas - 28 + 1, (len(pixels), 2), generator=random).tolist()
        placed = pixels.amin().expand(len(pixels), 3, canvas, canvas).clone()
        for image, (y, x), plain in zip(placed, places, pixels, strict=True):
            image[:, y : y + 28, x : x + 28] = plain
        splits.append(Images(placed, found["labels"]))
    return splits[0], splits[1]


def accuracy(rows: Images, again: Images | None, network: nn.Module) -> float:
    """Return accuracy in percent, after re-estimating batch norm on the training rows if `again` holds them."""
    network.eval()
    with torch.no_grad():
        if again is not None:
            norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d)]
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain mean over the batches
                norm.train()
            for pixels in again.pixels[:2000].split(128):
                network(pixel_values=pixels)
            network.eval()
        logits = torch.cat([network(pixel_values=pixels).logits for pixels in rows.pixels.split(250)])
    return 100 * (logits.argmax(1) == rows.labels).double().mean().item()


def sequence_metric(task: Any, network: nn.Module) -> float:
    """Return the task's own validation metric, in percent if it is a fraction."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_eval_batch_size=256, use_cpu=True, report_to="none", disable_tqdm=True
        )
        trainer = Trainer(
            network,
            args,
            eval_dataset=task.eval_dataset,
            data_collator=task.data_collator,
            compute_metrics=task.compute_metrics,
            preprocess_logits_for_metrics=task.preprocess_logits_for_metrics,
        )
        value = trainer.evaluate()[f"eval_{task.metric}"]
    return value * 100 if task.percent else value


def sequences(name: str, **changes: Any) -> Case:
    """Return a task of recipes/rnn_vs_transformer.py in its small preset."""
    chosen = preset(name, "small")
    own = {"text_files": ["outputs/shakespeare.txt"]} if name == "language_modeling" else {}
    task = build_task(name, **chosen.task, **own)
    guidance = {k: v for k, v in chosen.guidance.items() if k != "measure"}
    values: dict[str, Any] = {"training": chosen.training, "guidance": guidance, "collator": task.data_collator}
    values |= changes
    values["training"] = chosen.training | values["training"]
    if values.get("guide_training"):
        values["guide_training"] = chosen.training | chosen.guide_training | values["guide_training"]
    evaluate = partial(sequence_metric, task)
    return Case(partial(chosen.target, task), partial(chosen.guide, task), task.train_dataset, evaluate, **values)


def resnet(depths: list[int], sizes: dict[str, Any]) -> nn.Module:
    """Return a small ResNet with skips, to guide."""
    return ResNetForImageClassification(ResNetConfig(depths=depths, num_labels=10, **sizes))


def images(name: str, source: str) -> Case:
    """Return a task on Fashion-MNIST."""
    base = {"learning_rate": 1e-3, "per_device_train_batch_size": 128, "lr_scheduler_type": "linear"}
    small = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "layer_type": "basic"}
    teach = base | {"max_steps": 400}
    if name == "convnet":
        train, validation = fashion(source, 5000)
        return Case(
            lambda: PlainResNetForImageClassification(PlainResNetConfig(num_labels=10, **SIZES)),
            lambda: resnet([3, 4, 6, 3], SIZES),
            train,
            partial(accuracy, validation, None),
            base | {"learning_rate": 3e-3, "per_device_train_batch_size": 64, "max_steps": 400},
            {"guide_layers": ["ResNetBottleNeckLayer"]},
            teach,
        )
    wide = name == "wide_fcn"
    train, validation = fashion(source, 2000 if wide else 5000, 40 if wide else 28)
    make = FCNConfig.wide if wide else FCNConfig.deep
    sizes = {"hidden_size": 512, "image_size": 40} if wide else {"hidden_size": 256, "num_hidden_layers": 49}
    sizes |= {"num_labels": 10} if wide else {"num_labels": 10, "image_size": 28}
    return Case(
        lambda: FCNForImageClassification(make(**sizes)),
        lambda: resnet([2, 2, 2, 2], small),
        train,
        partial(accuracy, validation, train),
        base | ({"max_steps": 250} if wide else {"max_steps": 300}),
        {"guide_layers": ["Conv2d"]},
        teach,
    )


def train(network: nn.Module, case: Case, training: dict[str, Any], seed: int, **guided: Any) -> tuple[float, Trainer]:
    """Train a network, and return its CPU time and its trainer."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 10, "disable_tqdm": True}
        own |= {"seed": seed, "use_cpu": True, "report_to": "none"}
        args = TrainingArguments(folder, **(training | own))
        make = GuidanceTrainer if guided else Trainer
        trainer = make(network, args, train_dataset=case.rows, data_collator=case.collator, **guided)
        before = time.process_time()
        trainer.train()
    return time.process_time() - before, trainer


def trained_guide(name: str, case: Case, seed: int, folder: Path) -> nn.Module:
    """Return a seed's guide, trained once and kept."""
    set_seed(1000 + seed)
    guide = case.guide()
    if case.guide_training is not None:
        place = folder / f"{name}-{seed}.pt"
        if not place.exists():
            train(guide, case, case.guide_training, seed)
            torch.save(guide.state_dict(), place)
        guide.load_state_dict(torch.load(place))
    return guide


def run(
    name: str, case: Case, label: str, fields: dict[str, Any], weight: float, seed: int, folder: Path
) -> dict[str, Any]:
    """Train one target, guided or alone, and return what the table needs."""
    guided: dict[str, Any] = {}
    if weight:
        config = GuidanceConfig(guidance_weight=weight, log_measures=[], **(case.guidance | fields))
        guided = {"guide": trained_guide(name, case, seed, folder), "guidance": config}
    set_seed(seed)
    target = case.target()
    seconds, trainer = train(target, case, case.training, seed, **guided)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    seen = [[v for k, v in log.items() if k.startswith("guidance/similarity/")] for log in (logs[0], logs[-1])]
    similarity = [statistics.fmean(values) if values else None for values in seen]
    found = {"task": name, "measure": label, "weight": weight, "seed": seed, "value": case.evaluate(target)}
    return found | {"seconds": round(seconds, 1), "first": similarity[0], "last": similarity[1]}


def table(results: list[dict[str, Any]], labels: Iterable[str], seeds: Sequence[int]) -> str:
    """Return the results as Markdown: task and weight × setting, each seed's value, the first similarity, the time."""
    labels = list(labels)
    lines = ["| task | weight | alone | " + " | ".join(labels) + " |", "|" + "---|" * (3 + len(labels))]
    for task in dict.fromkeys(r["task"] for r in results if r["measure"] in labels):
        for weight in WEIGHTS:
            cells = [
                [
                    r
                    for r in results
                    if (r["task"], r["measure"], r["weight"]) == (task, label, w) and r["seed"] in seeds
                ]
                for label, w in [("alone", 0.0), *((label, weight) for label in labels)]
            ]
            if not any(cells[1:]):
                continue
            words = []
            for found in cells:
                values = ", ".join(f"{r['value']:.1f}" for r in found)
                starts = [r["first"] for r in found if r["first"] is not None]
                taken = f"; {statistics.fmean(r['seconds'] for r in found):.0f} s" if found else ""
                words.append(values + (f" ({statistics.fmean(starts):.2f})" if starts else "") + taken)
            lines.append(f"| {task} | {weight:g} | " + " | ".join(words) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", default="zalando-datasets/fashion_mnist")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--rows", action="store_true", help="compare the guide on all rows and on a quarter of them")
    parser.add_argument("--measures", nargs="+", help="with --rows, these instead of the best of each task")
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = (*SEEDS, 102) if given.rows else SEEDS
    given.folder.mkdir(parents=True, exist_ok=True)
    log = given.folder / "results.jsonl"
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(r["task"], r["measure"], r["weight"], r["seed"]) for r in results}
    for name in given.tasks or (BEST if given.rows else CASES):
        case = CASES[name](given.images)
        settings = {(label, w): fields for w in WEIGHTS for label, fields in MEASURES.items()}
        if given.rows:
            batch = case.training["per_device_train_batch_size"]
            settings = {
                (f"{measure}, {label}", 1.0): {"measure": measure, "guide_rows": batch // part}
                for measure in given.measures or [BEST[name]]
                for label, part in ROWS.items()
            }
        for seed in seeds:
            for (label, weight), fields in [(("alone", 0.0), {}), *settings.items()]:
                if (name, label, weight, seed) in done:
                    continue
                found = run(name, case, label, fields, weight, seed, given.folder)
                assert math.isfinite(found["value"])
                results.append(found)
                with log.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                print(found, flush=True)
    compared = given.measures or dict.fromkeys(BEST.values())
    labels = MEASURES if not given.rows else [f"{measure}, {label}" for measure in compared for label in ROWS]
    print(table(results, labels, seeds))


BEST = {"language_modeling": "ridge", "convnet": "ridge_loo"}
CASES: dict[str, Callable[[str], Case]] = {
    "copy_paste": lambda _: sequences("copy_paste"),
    "language_modeling": lambda _: sequences(
        "language_modeling", training={"max_steps": 200}, guide_training={"max_steps": 600, "learning_rate": 2e-3}
    ),
    "convnet": partial(images, "convnet"),
    "wide_fcn": partial(images, "wide_fcn"),
    "deep_fcn": partial(images, "deep_fcn"),
}


if __name__ == "__main__":
    main()
