"""Five hundred random batches: each gives the loss of the plain batch it stands for, or an error in plain words."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCABULARY, gpt2, llama, seeded
from torch import Tensor, nn
from torch.nn.functional import pad

import hf_guidance
from hf_guidance import GuidanceConfig, GuidanceLoss

PACKAGE = str(Path(hf_guidance.__file__).parent)
ROWS, LENGTH = 6, 8
LENGTHS = torch.tensor([8, 3, 5, 6, 4, 7])
Batch = dict[str, Any]


class Recurrent(nn.Module):
    """A guide that takes no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(VOCABULARY, 8), nn.GRU(8, 8, batch_first=True)

    def forward(self, input_ids: Tensor) -> Any:
        return self.rnn(self.embed(input_ids))[0]


GUIDES: list[tuple[Callable[[], nn.Module], list[str]]] = [(llama, ["hidden_states"]), (Recurrent, ["rnn"])]


def plain() -> Batch:
    ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(LENGTH) < LENGTHS[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def columns_of(batch: Batch) -> set[str]:
    return batch.keys() & {"input_ids", "attention_mask", "labels"}


# ------------------------------------------------------------------------- changes that stand for the same batch


def longer(batch: Batch, draw: random.Random) -> None:
    more, fill = draw.randrange(1, 5), {"input_ids": draw.randrange(VOCABULARY), "labels": -100}
    for name in columns_of(batch):
        batch[name] = pad(batch[name], (0, more), value=fill.get(name, 0))


def permuted(batch: Batch, draw: random.Random) -> None:
    order = torch.tensor(draw.sample(range(ROWS), ROWS))
    batch |= {name: value[order] for name, value in batch.items() if isinstance(value, Tensor) and len(value) == ROWS}


def another_kind_of_mask(batch: Batch, draw: random.Random) -> None:
    mask = batch["attention_mask"] != 0
    kinds = [mask, mask.int(), mask.float(), mask.half(), mask.double(), mask.to(torch.uint8), 3 * mask.long()]
    kinds += [
        torch.zeros(mask.shape).masked_fill(~mask, low) for low in (float("-inf"), torch.finfo(torch.float32).min)
    ]
    batch["attention_mask"] = draw.choice(kinds)


def shorter_ids(batch: Batch, draw: random.Random) -> None:
    batch["input_ids"] = batch["input_ids"].to(torch.int32)


def foreign_columns(batch: Batch, draw: random.Random) -> None:
    columns = {
        "text": ["x"] * ROWS,
        "weight": torch.rand(ROWS),
        "id": torch.arange(ROWS),
        "note": None,
        "scale": 2.0,
        "scores": torch.rand(ROWS, 3),
        "values": [1.0] * ROWS,
    }
    for name in draw.sample(sorted(columns), draw.randrange(1, 4)):
        batch[name] = columns[name]


def without_labels(batch: Batch, draw: random.Random) -> None:
    del batch["labels"]


# ------------------------------------------------------------------------------------- changes that spoil it, or may


def nan_in_the_mask(batch: Batch, draw: random.Random) -> None:
    batch["attention_mask"] = batch["attention_mask"].float()
    batch["attention_mask"][draw.randrange(ROWS), 1] = float("nan")


def half_valid(batch: Batch, draw: random.Random) -> None:
    batch["attention_mask"] = batch["attention_mask"] * draw.choice([0.5, 0.999, 2.0])


def an_empty_row(batch: Batch, draw: random.Random) -> None:
    batch["attention_mask"][draw.randrange(ROWS)] = 0


def nothing_valid(batch: Batch, draw: random.Random) -> None:
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])


def no_positions(batch: Batch, draw: random.Random) -> None:
    for name in columns_of(batch):
        batch[name] = batch[name][:, :0]


def no_rows(batch: Batch, draw: random.Random) -> None:
    for name in columns_of(batch):
        batch[name] = batch[name][:0]


def few_rows(batch: Batch, draw: random.Random) -> None:
    count = draw.randrange(1, 4)
    for name in columns_of(batch):
        batch[name] = batch[name][:count]


def float_ids(batch: Batch, draw: random.Random) -> None:
    batch["input_ids"] = batch["input_ids"].float()


def ids_beyond_the_vocabulary(batch: Batch, draw: random.Random) -> None:
    batch["input_ids"][0, 0] = VOCABULARY + draw.randrange(9)


def a_mask_of_another_length(batch: Batch, draw: random.Random) -> None:
    batch["attention_mask"] = batch["attention_mask"][:, :-1]


def a_mask_of_other_rows(batch: Batch, draw: random.Random) -> None:
    batch["attention_mask"] = batch["attention_mask"][:-1]


def a_list_for_a_mask(batch: Batch, draw: random.Random) -> None:
    batch["attention_mask"] = batch["attention_mask"].tolist()


def no_inputs(batch: Batch, draw: random.Random) -> None:
    del batch["input_ids"]


SAME = [longer, permuted, shorter_ids, foreign_columns, without_labels]
SPOILT = [
    *(nan_in_the_mask, half_valid, an_empty_row, nothing_valid, no_positions, no_rows, few_rows, float_ids),
    *(ids_beyond_the_vocabulary, a_mask_of_another_length, a_mask_of_other_rows, a_list_for_a_mask, no_inputs),
]


def watch(loss: GuidanceLoss, batch: Batch) -> Any:
    """Watch a forward of the target, which gets the mask as 0 and 1.

    `GuidanceLoss` leaves the target's mask as it is, and gives a warning of one of 0 and -inf. Here it is converted
    before the target is called, so that only what guidance makes of such a mask is tested.
    """
    known = {name for name in batch if name in {"input_ids", "attention_mask"}}
    with loss.watch(batch) as watched:
        if watched.why_unguided:
            return watched
        inputs = {name: watched.inputs[name] for name in known}
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor):
            inputs["attention_mask"] = (mask == 0 if (mask.float() < 0).any() else mask != 0).long()
        loss.target(**inputs)
    return watched


def is_in_plain_words(error: Exception) -> bool:
    """Tell whether the package raised it itself, and says more than a word."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and last.filename.startswith(PACKAGE) and len(str(error)) > 40


@pytest.fixture(scope="module")
def losses() -> list[tuple[GuidanceLoss, float]]:
    found = []
    for make, layers in GUIDES:
        for axis in ("sequence", "token", "within"):
            settings: dict[str, Any] = {"measure": "linear_cka", "sample_axis": axis, "guide_layers": layers}
            loss = GuidanceLoss(gpt2().eval(), seeded(make, 1), GuidanceConfig(**settings))
            found.append((loss, float(watch(loss, plain()).loss)))
    return found


@pytest.mark.parametrize("block", range(10))
def test_a_random_batch_gives_the_right_loss_or_an_error_in_plain_words(
    losses: list[tuple[GuidanceLoss, float]], block: int
) -> None:
    for number in range(50):
        draw = random.Random(50 * block + number)
        loss, expected = draw.choice(losses)
        batch, changes = plain(), draw.sample(SAME, draw.randrange(1, 4))
        spoilt = draw.choice(SPOILT) if draw.random() < 0.6 else None
        if draw.random() < 0.5:
            changes.append(another_kind_of_mask)
        for change in [*changes, *([spoilt] if spoilt else [])]:
            change(batch, draw)
        what = f"seed {50 * block + number}: {[c.__name__ for c in changes]}, {spoilt and spoilt.__name__}"
        try:
            watched = watch(loss, batch)
        except Exception as error:
            if spoilt is None or not is_in_plain_words(error):
                pytest.fail(f"{what}: {error!r}")
            continue
        if spoilt is None:
            assert float(watched.loss) == pytest.approx(expected, abs=1e-5), what
        elif watched.loss is None:
            assert len(watched.why_unguided) > 40, what
        else:
            assert torch.isfinite(watched.loss), what
