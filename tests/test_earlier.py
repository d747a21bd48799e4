"""Files of earlier versions still load: a checkpoint, a pushed target, a guide's cache, a recipe's results."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Recipe
from trainers import train_logs
from transformers import AutoModelForCausalLM

from hf_guidance import GuidanceConfig, load_guide, load_guide_of

sys.path.insert(0, str(Path(__file__).parent / "scripts"))

from earlier import CACHED, RECIPE, guided

EARLIER = Path(__file__).parent / "earlier"
drawn_alike = pytest.mark.skipif(
    json.loads((EARLIER / "pushed" / "guidance_config.json").read_text())["guide"]["versions"]["torch"]
    != torch.__version__,
    reason="another version of torch draws other random weights",
)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EARLIER, tmp_path / "earlier"))


def test_a_run_goes_on_from_its_checkpoint(earlier: Path) -> None:
    trainer = guided(earlier / "run", load_guide(earlier / "guide"), 4, measure="debiased_cka")
    trainer.train(resume_from_checkpoint=True)
    logs = train_logs(trainer)
    assert [log["step"] for log in logs] == [1, 2, 3, 4]
    assert all("guidance/similarity/hidden_states.1~hidden_states.1" in log for log in logs)
    assert logs[-1]["loss"] < logs[0]["loss"]


def test_a_pushed_target_loads_with_its_own_code_and_without_it(earlier: Path) -> None:
    from hf_guidance.targets import RNNForCausalLM

    ids = torch.arange(8)[None]
    own = AutoModelForCausalLM.from_pretrained(earlier / "pushed", trust_remote_code=True)
    torch.testing.assert_close(own(ids).logits, RNNForCausalLM.from_pretrained(earlier / "pushed")(ids).logits)
    config, guide = GuidanceConfig.load(earlier / "pushed")
    assert (config.measure, guide["seed"], guide["untrained"]) == ("linear_cka", 3, True)


@drawn_alike
def test_the_guide_of_a_pushed_target_is_rebuilt(earlier: Path) -> None:
    assert load_guide_of(earlier / "pushed").config.n_layer == 2


def test_a_cache_is_read_and_the_guide_runs_on_the_first_rows_alone(earlier: Path, tmp_path: Path) -> None:
    rows, guide = [], load_guide(earlier / "guide")
    guide.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    trainer = guided(tmp_path / "run", guide, 3, **CACHED | {"cache_guide": str(earlier / "cache")})
    trainer.train()
    assert rows == [8], "the look at the first rows, and no step"


@drawn_alike
def test_a_recipes_results_are_read_and_not_made_again(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = earlier / "recipe"
    before: dict[str, Any] = json.loads((folder / "results.json").read_text())
    monkeypatch.setattr("transformers.Trainer.train", lambda *args, **kwargs: pytest.fail("trains"))
    recipe = Recipe("rnn_vs_transformer", {})
    monkeypatch.setattr(recipe, "flags", lambda *args: [*RECIPE, str(folder)])
    after = recipe.run_here(monkeypatch, folder)
    assert after["runs"] == before["runs"]
    assert (folder / "seed-0" / "untrained_guide" / "README.md").read_text().startswith("---\n")
