"""The film of the similarity map: its frames, that training is the same with it, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import gpt2, llama, token_batch, token_rows
from PIL import Image
from trainers import make_trainer, same, weights
from transformers import Trainer, TrainingArguments

from hf_guidance.analysis.similarity_map import similarity_map
from hf_guidance.trainer import SimilarityFilm


def train(folder: Path, film: SimilarityFilm | None, **options: Any) -> Any:
    resume = options.pop("resume", None)
    trainer = make_trainer(folder, gpt2(), llama(), eval_dataset=token_rows(), max_steps=4, **options)
    if film is not None:
        trainer.add_callback(film)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_frame_is_the_map_of_the_weights_at_its_step_and_training_is_the_same(tmp_path: Path) -> None:
    film = SimilarityFilm(every=2, path=tmp_path / "film.gif")
    filmed = train(tmp_path / "a", film)
    plain = train(tmp_path / "b", None)
    assert same(weights(filmed.model), weights(plain.model))
    assert list(film.frames) == [0, 2, 4]
    batch = {name: value[:4] for name, value in next(iter(filmed.get_eval_dataloader())).items()}
    for step, network in ((0, gpt2()), (4, filmed.model)):
        assert film.frames[step] == similarity_map(network, filmed.guide, filmed.guidance, batch)
    assert film.frames[0]["similarity"] != film.frames[4]["similarity"]
    with Image.open(tmp_path / "film.gif") as drawn:
        assert getattr(drawn, "n_frames", 1) >= 3


def test_a_resumed_run_keeps_the_frames_from_before(tmp_path: Path) -> None:
    whole = SimilarityFilm(every=2)
    train(tmp_path, whole, save_strategy="steps", save_steps=3)
    rest = SimilarityFilm(every=2, path=tmp_path / "film.png")
    train(tmp_path, rest, save_strategy="steps", save_steps=3, resume=str(tmp_path / "checkpoint-3"))
    assert rest.frames == whole.frames
    assert (tmp_path / "film.png").is_file()


def test_a_batch_of_ones_own_is_compared(tmp_path: Path) -> None:
    batch = token_batch(seed=7)
    film = SimilarityFilm(every=4, batch=batch)
    trainer = make_trainer(tmp_path, gpt2(), llama(), max_steps=4)
    trainer.add_callback(film)
    trainer.train()
    assert film.frames[0] == similarity_map(gpt2(), trainer.guide, trainer.guidance, batch)


def test_what_has_no_map_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"every is 0; a film needs a frame every 1 or more"):
        SimilarityFilm(every=0)
    trainer = make_trainer(tmp_path, gpt2(), llama())
    trainer.add_callback(SimilarityFilm(every=2))
    with pytest.raises(ValueError, match=r"there is no eval_dataset that is read by number.*pass batch="):
        trainer.train()
    trainer = make_trainer(tmp_path, gpt2(), llama(), eval_dataset=token_rows(), guidance_weight=0.0)
    trainer.add_callback(SimilarityFilm(every=2))
    with pytest.raises(ValueError, match=r"this run has no guide with a weight"):
        trainer.train()
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    alone = Trainer(model=gpt2(), args=args, train_dataset=token_rows(), callbacks=[SimilarityFilm(every=2)])
    with pytest.raises(ValueError, match=r"SimilarityFilm needs a guide: give it to a GuidanceTrainer"):
        alone.train()
    assert torch.equal(next(iter(weights(alone.model).values())), next(iter(weights(gpt2()).values())))
