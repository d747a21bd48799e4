"""Several forwards of the target in one step, each guided on its own inputs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import PlainNet, gpt2, guidance_by_hand, linear, llama, token_batch
from torch import Tensor, nn
from trainers import make_trainer

from hf_guidance import GuidanceConfig, GuidanceLoss
from hf_guidance.trainer.forwards import check_watches_each, watch_each, watches_each

BATCHES = [token_batch(seed=seed) for seed in range(3)]


def losses_of(target: Any, batches: list[dict[str, Tensor]], through_hooks: bool) -> Tensor:
    """The mean task loss over batches, by calls of the network, or of its forward as sentence-transformers does."""
    call = target if through_hooks else lambda **inputs: target.forward(**inputs)
    return torch.stack([call(**batch).loss for batch in batches]).mean()


@pytest.mark.parametrize("through_hooks", [True, False])
def test_losses_and_similarities_are_means_over_the_forwards(through_hooks: bool) -> None:
    target, guide = gpt2(), llama()
    guidance = GuidanceLoss(target, guide, linear())
    with watch_each(guidance, {"columns": 3, "guide_own": 1}) as watched:
        assert watched.inputs == {"columns": 3}
        task = losses_of(target, BATCHES, through_hooks)
    expected = torch.stack([guidance_by_hand(gpt2(), guide, batch) for batch in BATCHES]).mean()
    assert watched.loss is not None
    torch.testing.assert_close(watched.loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert sum(1 - value for value in watched.similarities["linear_cka"].values()).item() == pytest.approx(
        expected.item(), abs=1e-5
    )
    assert watched.similarities["debiased_cka"].keys() == watched.similarities["linear_cka"].keys()
    watched.total(task).backward()
    fresh = gpt2()
    (
        losses_of(fresh, BATCHES, True) + torch.stack([guidance_by_hand(fresh, guide, b) for b in BATCHES]).mean()
    ).backward()
    for one, other in zip(target.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_positional_inputs_reach_the_guide_by_name() -> None:
    target, guide = PlainNet(), llama()
    guidance = GuidanceLoss(target, guide, linear(target_layers=["body.2"], guide_layers=["hidden_states.3"]))
    with watch_each(guidance, {}) as watched:
        target(BATCHES[0]["input_ids"], labels=BATCHES[0]["labels"])
    with guidance.watch(BATCHES[0]) as expected:
        target(**expected.inputs)
    assert watched.loss is not None
    assert torch.equal(watched.loss, expected.loss)


def test_forwards_without_gradients_are_left_out_unless_none_has_any() -> None:
    target = gpt2()
    guidance = GuidanceLoss(target, llama(), linear())
    with watch_each(guidance, {}) as watched:
        with torch.no_grad():
            target(**BATCHES[1])
        target(**BATCHES[0])
    with guidance.watch(BATCHES[0]) as expected:
        target(**expected.inputs)
    assert torch.equal(watched.loss, expected.loss)
    with torch.no_grad(), watch_each(guidance, {}) as watched:
        target(**BATCHES[0])
    assert watched.loss.item() == expected.loss.item()


def test_a_weight_of_0_runs_no_guide_and_leaves_the_forward_alone() -> None:
    target, guide = gpt2(), llama()
    guide.forward = lambda *args, **kwargs: pytest.fail("the guide ran")  # type: ignore[method-assign]
    with watch_each(GuidanceLoss(target, guide, linear(guidance_stop_step=1)), BATCHES[0], step=1) as watched:
        assert "forward" not in vars(target)
        target(**watched.inputs)
    assert watched.loss is None


def test_the_forward_is_the_targets_own_again_after_an_error_too() -> None:
    target = gpt2()
    guidance = GuidanceLoss(target, llama(), linear())
    handle = target.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), watch_each(guidance, {}):
        target(**BATCHES[0])
    handle.remove()
    assert "forward" not in vars(target)
    given = target.forward
    target.forward = given
    with watch_each(guidance, {}):
        target(**BATCHES[0])
    assert target.forward is given


def test_no_forward_is_an_error_and_one_that_is_too_small_gives_its_reason() -> None:
    guidance = GuidanceLoss(target := gpt2(), llama(), linear())
    with pytest.raises(ValueError, match=r"target did not run with gradients.*use the same loss without a cache"):
        nothing(guidance)
    with watch_each(guidance, {}) as watched:
        target(**token_batch(rows=1))
    assert watched.loss is None
    assert "linear_cka needs at least" in watched.why_unguided


def nothing(guidance: GuidanceLoss) -> None:
    with watch_each(guidance, {}):
        pass


def test_each_forward_draws_noise_of_its_own() -> None:
    target, guide = gpt2(), llama()
    seen: list[Tensor] = []
    guide.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    with watch_each(GuidanceLoss(target, guide, linear(guide_input="noise")), {}):
        losses_of(target, BATCHES[:2], True)
    assert not torch.equal(*seen)


class Model(nn.Sequential):
    """Stands in for a model of sentence-transformers."""


Model.__module__ = "sentence_transformers.base.model"


def trainer_of(model: nn.Module, guide: nn.Module, **settings: Any) -> Any:
    accelerator = SimpleNamespace(unwrap_model=lambda model, **_: model)
    return SimpleNamespace(model=model, guide=guide, accelerator=accelerator, guidance=GuidanceConfig(**settings))


def test_a_trainer_of_sentence_transformers_is_told_by_its_model(tmp_path: Path) -> None:
    assert watches_each(trainer_of(Model(gpt2()), llama()))
    assert not watches_each(make_trainer(tmp_path, gpt2(), llama()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"similarity_batch": "accumulated"},
            "^similarity_batch='accumulated' needs a trainer that runs the target once",
        ),
        ({"sample_axis": "within"}, "^sample_axis='within' needs"),
        ({"guide_batch_norm": "calibrated"}, "^guide_batch_norm='calibrated' needs"),
        ({"sketch": 8, "cache_guide": "c", "sample_id_column": "id"}, "^cache_guide needs"),
    ],
)
def test_settings_for_one_forward_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_watches_each(trainer_of(Model(gpt2()), llama(), **settings))


def test_another_vocabulary_is_refused_unless_the_tokenizer_is_shared() -> None:
    model, guide = Model(gpt2()), llama(vocabulary=19)
    with pytest.raises(
        ValueError, match=r"vocabulary has 17 tokens and the guide's 19, but sentence-transformers token"
    ):
        check_watches_each(trainer_of(model, guide))
    check_watches_each(trainer_of(model, guide, guide_shares_tokenizer=True))
    check_watches_each(trainer_of(model, llama()))
