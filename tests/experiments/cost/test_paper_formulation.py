"""The yardstick is the paper's formulation, in value, in gradients and in work."""

import copy

import torch
from builders import arguments, cka, gpt2, gradients, guidance_by_hand, linear, llama, module_outputs, token_batch
from costs import CONVS, fcn, operations_of
from torch import nn

from hf_guidance import GuidanceLoss
from hf_guidance.experiments.cost.paper_formulation import PaperTrainer
from hf_guidance.experiments.cost.paper_formulation import cka as paper_cka
from hf_guidance.experiments.cost.random_rows import random_images


def test_the_yardsticks_loss_is_one_minus_cka_summed_over_the_pairs(tmp_path):
    target, guide, batch = gpt2(), llama().eval(), token_batch()
    trainer = PaperTrainer(model=target, args=arguments(tmp_path), guide=guide, guidance=linear())
    target.train()
    found = trainer.paper_loss(target, batch)
    torch.testing.assert_close(found.double(), guidance_by_hand(target, guide, batch), rtol=1e-4, atol=0)


def test_the_yardsticks_loss_and_gradients_on_images_are_those_of_the_guidance_loss(tmp_path, resnet):
    target, guide, batch = fcn().train().double(), copy.deepcopy(resnet).double(), random_images(8, 32, 4)[:8]
    batch["pixel_values"] = batch["pixel_values"].double()
    trainer = PaperTrainer(model=target, args=arguments(tmp_path), guide=guide, guidance=CONVS)
    guidance = GuidanceLoss(target, guide, CONVS)
    with guidance.watch(batch) as watched:
        target(**watched.inputs)
    convs = [name for name, module in guide.named_modules() if isinstance(module, nn.Conv2d)]
    theirs = module_outputs(guide, convs, batch["pixel_values"])
    ours = target(batch["pixel_values"], output_hidden_states=True).hidden_states[1:]
    even = [int(i * 2 / (len(convs) - 1) + 0.5) for i in range(len(convs))]
    by_hand = sum(1 - cka(ours[t], features) for t, features in zip(even, theirs, strict=True))
    paper = trainer.paper_loss(target, batch)
    torch.testing.assert_close(paper, by_hand, rtol=1e-9, atol=0)
    expected = gradients(target, watched.loss)
    assert max(gradient.abs().max() for gradient in expected) > 1e-3
    torch.testing.assert_close(gradients(target, paper), expected, rtol=1e-6, atol=1e-9)


def test_a_pair_costs_the_yardstick_six_grams_and_twelve_square_products():
    x, y = torch.randn(5, 11), torch.randn(5, 7)
    assert operations_of(paper_cka, x, y) == 3 * 2 * 5 * 5 * (11 + 7) + 12 * 2 * 5**3


def test_the_yardstick_runs_the_target_twice_a_step_and_adds_the_weighted_sum(tmp_path):
    config = linear(guidance_weight=0.5, layer_pairs=["hidden_states.2~hidden_states.1"])
    target, guide = gpt2(), llama().eval()
    trainer = PaperTrainer(model=target, args=arguments(tmp_path), guide=guide, guidance=config)
    runs = []
    target.register_forward_pre_hook(lambda *_: runs.append(1))
    target.train()
    batch = token_batch()
    loss = trainer.compute_loss(target, batch)
    assert len(runs) == 2
    ours = target(**batch, output_hidden_states=True).hidden_states[2]
    theirs = guide(batch["input_ids"], output_hidden_states=True).hidden_states[1]
    expected = target(**batch).loss + 0.5 * (1 - cka(ours, theirs))
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-4, atol=0)


def test_the_yardstick_weighs_pairs_as_the_guidance_loss_does(tmp_path):
    pairs = [
        "hidden_states.2~hidden_states.1@3",
        "hidden_states.1~hidden_states.1",
        "hidden_states.1~hidden_states.2@0",
    ]
    config = linear(measure="linear_cka", layer_pairs=pairs)
    target, guide, batch = gpt2(), llama().eval(), token_batch()
    trainer = PaperTrainer(model=target, args=arguments(tmp_path), guide=guide, guidance=config)
    ours = target(**batch, output_hidden_states=True).hidden_states
    theirs = guide(batch["input_ids"], output_hidden_states=True).hidden_states
    expected = 3 * (1 - cka(ours[2], theirs[1])) + 1 - cka(ours[1], theirs[1])
    torch.testing.assert_close(trainer.paper_loss(target, batch).double(), expected, rtol=1e-4, atol=1e-6)
