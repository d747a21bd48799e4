"""Each cell of the table of recipes/guides/many_gpus.md: which settings go with which sample axis."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from builders import VOCABULARY, gpt2, gradients, llama, llama_config, seeded, token_batch
from torch import Tensor
from transformers import DataCollatorWithFlattening, LlamaForCausalLM

from hf_guidance import GuidanceConfig, GuidanceLoss
from hf_guidance.trainer.accumulation import Accumulated

AXES = ("sequence", "token", "within")
SETTINGS: dict[str, dict[str, Any]] = {
    "`sketch`": {"sketch": 8, "measure": "linear_cka"},
    "`cache_guide`": {"sketch": 8, "measure": "linear_cka", "cache_guide": "cache", "sample_id_column": "id"},
    '`similarity_batch="global"`': {"similarity_batch": "global"},
    '`similarity_batch="accumulated"`': {"similarity_batch": "accumulated"},
    '`guide_input="shuffled"`': {"guide_input": "shuffled"},
    "`torch_compile`": {},
    "`guide_rows`": {"guide_rows": 5},
    "packed documents": {},
}
PAGE = Path(__file__).parents[1] / "recipes" / "guides" / "many_gpus.md"
TABLE = {
    cells[0]: dict(zip(AXES, cells[1:], strict=True))
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if (cells := [cell.strip() for cell in line.strip("|").split("|")])[0] in SETTINGS and len(cells) == 4
}
ACCEPTED = [(name, axis) for name, row in TABLE.items() for axis, cell in row.items() if cell == "accepted"]
REFUSED = [(name, axis) for name, row in TABLE.items() for axis, cell in row.items() if cell != "accepted"]


def test_the_table_has_a_row_for_each_setting() -> None:
    assert list(TABLE) == list(SETTINGS)
    assert all(cell == "accepted" or cell.startswith("refused: ") for row in TABLE.values() for cell in row.values())


@pytest.mark.parametrize(("name", "axis"), REFUSED)
def test_what_is_refused_is_an_error_before_any_forward(name: str, axis: str) -> None:
    with pytest.raises(ValueError, match=re.compile("leave|cache_guide needs")):
        GuidanceConfig(sample_axis=axis, **SETTINGS[name])


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("name", "axis"), ACCEPTED)
def test_what_is_accepted_guides(name: str, axis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target, guide = seeded(lambda: LlamaForCausalLM(llama_config(layers=2)), 0), llama()
    target.config.use_cache = False
    batch: dict[str, Any] = token_batch()
    if name == "packed documents":
        rows = [{"input_ids": row, "labels": row} for row in batch["input_ids"].tolist()]
        batch = dict(DataCollatorWithFlattening()(rows))
    guidance = GuidanceLoss(target, guide, GuidanceConfig(sample_axis=axis, **SETTINGS[name]))
    if name == "`cache_guide`":
        batch["id"] = torch.arange(len(batch["input_ids"]))
        guidance.open_cache(batch, len(batch["id"]), {})
    run = torch.compile(target, backend="eager") if name == "`torch_compile`" else target
    window = Accumulated(guidance, [batch, token_batch(seed=1)]) if "accumulated" in name else None
    with window.watch(0) if window else guidance.watch(batch) as watched:
        run(**watched.inputs)
    assert watched.loss is not None, watched.why_unguided
    slopes: list[Tensor] = gradients(target, watched.loss)
    assert all(slope.isfinite().all() for slope in slopes)
    assert any(slope.count_nonzero() for slope in slopes)


def test_the_guide_on_some_rows_takes_no_packed_documents() -> None:
    rows = [{"input_ids": row} for row in torch.randint(VOCABULARY, (4, 5)).tolist()]
    guidance = GuidanceLoss(gpt2(), llama(), GuidanceConfig(guide_rows=4))
    with (
        pytest.raises(ValueError, match="this batch is one row of packed documents: pad the rows"),
        guidance.watch(dict(DataCollatorWithFlattening()(rows))),
    ):
        pass
