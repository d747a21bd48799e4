"""Variants are the real trainers, timed and read within their own steps."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from builders import arguments, gpt2, llama
from costs import texts
from transformers import Trainer

from hf_guidance import GuidanceConfig, GuidanceTrainer
from hf_guidance.experiments.cost.meters import Reading
from hf_guidance.experiments.cost.paper_formulation import PaperTrainer
from hf_guidance.experiments.cost.variants import Steps


def test_a_timed_trainer_takes_the_steps_that_it_takes_untimed(tmp_path):
    def trained(timed):
        options = {"guide": llama(), "guidance": GuidanceConfig(), "train_dataset": texts()}
        trainer = GuidanceTrainer(gpt2(), arguments(tmp_path, max_steps=3), **options)
        if timed:
            steps = Steps(trainer, discard=1, cycle=1)
            steps.advance(3)
            assert len(steps.meter.steps) == len(steps.meter.forwards) == 2
            assert all(0 < f < s for f, s in zip(steps.meter.forwards, steps.meter.steps, strict=True))
        else:
            trainer.train()
        return trainer.model.state_dict()

    expected, found = trained(False), trained(True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@contextmanager
def forty_two(open_ones):
    open_ones.append(1)
    reading = Reading()
    yield reading
    reading.value = 42
    open_ones.pop()


def test_counted_steps_are_read_one_by_one_and_then_timed_again(tmp_path):
    steps, inside = Steps(Trainer(gpt2(), arguments(tmp_path), train_dataset=texts()), discard=2, cycle=1), []
    assert steps.read(partial(forty_two, inside), 3) == [42, 42, 42]
    assert (inside, steps.meter.steps) == ([], [])
    steps.advance(3)
    assert len(steps.meter.steps) == 1


def test_a_reading_may_begin_where_the_step_before_ended(tmp_path):
    class Fetches(Trainer):
        def get_batch_samples(self, *args, **kwargs):
            order.append(f"fetch in {len(inside)}")
            return super().get_batch_samples(*args, **kwargs)

        def compute_loss(self, *args, **kwargs):
            order.append(f"step in {len(inside)}")
            return super().compute_loss(*args, **kwargs)

    order, inside = [], []
    steps = Steps(Fetches(gpt2(), arguments(tmp_path), train_dataset=texts()), discard=1, cycle=1)
    assert steps.read(partial(forty_two, inside), 2, fetching=True) == [42, 42]
    assert (order[:6], inside) == (["fetch in 0", "step in 0", *["fetch in 1", "step in 1"] * 2], [])
    order.clear()
    assert steps.read(partial(forty_two, inside), 1) == [42]
    assert order[:4] == ["fetch in 0", "step in 0", "fetch in 0", "step in 1"]


def test_a_step_that_fails_leaves_nothing_measuring(tmp_path):
    class Fails(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.state.global_step == 2:
                raise RuntimeError("out of memory")
            return super().compute_loss(model, inputs, *args, **kwargs)

    steps, inside = Steps(Fails(gpt2(), arguments(tmp_path), train_dataset=texts()), discard=1, cycle=1), []
    with pytest.raises(RuntimeError, match="out of memory"):
        steps.read(partial(forty_two, inside), 3)
    assert inside == []
    steps.advance(2)
    assert len(steps.meter.steps) == 1


def test_the_plain_variant_is_a_trainer_and_no_guidance_trainer(tmp_path):
    from hf_guidance.experiments.cost.variants import make_trainers

    made = make_trainers(gpt2(), llama(), texts(), arguments(tmp_path), GuidanceConfig())
    assert {name: type(trainer) for name, trainer in made.items()} == {
        "plain": Trainer,
        "guided": GuidanceTrainer,
        "paper": PaperTrainer,
    }
    first, second = (trainer.model for name, trainer in made.items() if name != "paper")
    assert first is not second
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
