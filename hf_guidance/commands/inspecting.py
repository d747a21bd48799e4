"""`hf-guidance inspect`: a target and a guide measured on data, to a report and a setting of guidance."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_guidance.commands.data import Collator, Data, add_flags, check_flags, read, tokenizer_of
from hf_guidance.commands.networks import check_colours, check_same_kind, head_for, kind_of, load, load_target
from hf_guidance.config import AUTO, HIDDEN_STATES, GuidanceConfig
from hf_guidance.experiments.inspection import inspect
from hf_guidance.guide.forward import accepted_columns
from hf_guidance.guide.inputs import GUIDE_PREFIX, vocabulary_size
from hf_guidance.tasks.base import IGNORED_LABEL
from hf_guidance.trainer.checks import check_writable
from hf_guidance.trainer.guidance_trainer import GuidanceTrainer


def add_command(commands: Any) -> None:
    """Add the command and its flags to a parser."""
    parser = commands.add_parser("inspect", help="guidance measured over some batches, and a setting proposed")
    parser.add_argument("target", help="network to train: Hub id, folder, or timm/<architecture>")
    parser.add_argument("guide", help="network to guide it")
    add_flags(parser)
    parser.add_argument("--batches", type=int, default=4, help="batches to measure (default 4)")
    parser.add_argument("--untrained_target", type=int, metavar="SEED", help="random weights for the target")
    parser.add_argument("--untrained_guide", type=int, metavar="SEED", help="random weights for the guide")
    parser.add_argument("--measure", default=AUTO, help="measure of the setting to begin with")
    parser.add_argument("--sample_axis", default="sequence", help="sequence, token or within, to begin with")
    parser.add_argument("--target_layers", nargs="+", help="layers of the target: hidden_states, names, globs or types")
    parser.add_argument("--guide_layers", nargs="+", help="layers of the guide")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--output", default="inspection", help="folder for guidance.yaml and inspection.json")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    """Inspect two networks; print the report before it is saved."""
    check_writable(given.output, "--output")
    check_flags(given)
    if given.device != "cpu" and not (given.device == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"--device is {given.device}, which is not there: expected cpu, or cuda where there is one.")
    head = head_for(given.target)
    kind = "images" if "Image" in head.__name__ else "text"
    guide = load(given.guide, given.untrained_guide)
    names, seeds = (given.target, given.guide), (given.untrained_target, given.untrained_guide)
    check_same_kind(names, (kind, kind_of(guide, given.guide)))
    decodes = "Seq2Seq" in head.__name__ or "decoder_input_ids" in accepted_columns(guide)
    data = read(given, kind, names, seeds, decodes=decodes, training=True)
    target = load_target(given.target, given.untrained_target, head, data.classes)
    collator = data.collator
    if kind == "images":
        for name, network in zip(names, (target, guide), strict=True):
            check_colours(network, name)
    else:
        collator = for_training(data.collator, target, guide, labels_of(head.__name__, given.target))
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = _trainer(given, target, guide, data._replace(collator=collator), folder)
            found = inspect(trainer, batches=given.batches)
        except ValueError as error:
            raise ValueError(str(error).replace("per_device_train_batch_size", "--batch_size")) from error
    print(found, flush=True)
    print("\n" + ", ".join(map(str, found.save(given.output))))


def _trainer(
    given: argparse.Namespace, target: nn.Module, guide: nn.Module, data: Data, folder: str
) -> GuidanceTrainer:
    """Make a trainer that is inspected, and never trains."""
    first = data.collator([data.rows[0]])
    own = any(name.startswith(GUIDE_PREFIX) for name in first)
    sizes = vocabulary_size(target), vocabulary_size(guide)
    config = GuidanceConfig(
        measure=given.measure,
        sample_axis=given.sample_axis,
        target_layers=given.target_layers or [HIDDEN_STATES],
        guide_layers=given.guide_layers or [HIDDEN_STATES],
        guide_shares_tokenizer="input_ids" in first and not own and sizes[0] != sizes[1],
    )
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=given.batch_size,
        use_cpu=given.device == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows: Any = data.rows
    return GuidanceTrainer(target, args, data_collator=data.collator, train_dataset=rows, guide=guide, guidance=config)


Labelling = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def labels_of(head: str, target: str) -> Labelling:
    """Return what adds the labels of a language model to a batch of tokens.

    Args:
        head: Name of its Auto class.
        target: Where its tokenizer is.
    """
    if "Masked" in head:
        from transformers import DataCollatorForLanguageModeling

        tokenizer = tokenizer_of(target)
        if tokenizer.mask_token is None:
            raise ValueError(f"{target} predicts masked tokens, but its tokenizer has no mask_token: set it there.")
        masking = DataCollatorForLanguageModeling(tokenizer)

        def mask(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            ids, labels = masking.torch_mask_tokens(batch["input_ids"].clone())
            return {**batch, "input_ids": ids, "labels": labels}

        return mask

    def repeat(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        labels = ids if mask is None else ids.masked_fill(mask == 0, IGNORED_LABEL)
        return {**batch, "labels": labels}

    return repeat


def for_training(collator: Collator, target: nn.Module, guide: nn.Module, label: Labelling) -> Collator:
    """Return a collator of batches that a Trainer passes to the target: its own columns, the guide's, and labels.

    Args:
        collator: Makes a batch of tokens.
        target: The target, which sees the columns that it accepts.
        guide: The guide. If it needs columns that the target does not accept, it gets columns of its own.
        label: Result of `labels_of`.
    """
    ours, theirs = accepted_columns(target), accepted_columns(guide)

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        batch = label(collator(rows))
        own = {name: value for name, value in batch.items() if name.startswith(GUIDE_PREFIX)}
        if not own and any(name in theirs and name not in ours for name in batch if name.startswith("decoder_")):
            own = {GUIDE_PREFIX + name: value for name, value in batch.items() if name in theirs and name != "labels"}
        return {name: value for name, value in batch.items() if name in (*ours, "labels")} | own

    return collate
