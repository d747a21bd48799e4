"""Inputs that are made or checked: those of a decoder, noise, shuffled rows, own columns and vocabularies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import gpt2, llama, llama_config, seeded, token_batch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    SpeechT5Config,
    SpeechT5ForTextToSpeech,
    ViTConfig,
    ViTModel,
)
from transformers.models.speecht5.modeling_speecht5 import shift_spectrograms_right

from hf_guidance import GuidanceConfig, GuidanceLoss
from hf_guidance.guide.forward import (
    generator_for,
    seen_by_target,
)
from hf_guidance.guide.inputs import check_own_columns, check_vocabularies, noise_like, shuffle_rows, vocabulary_size

IDS, MASK, PIXELS = torch.arange(12).reshape(4, 3), torch.ones(4, 3, dtype=torch.int64), torch.zeros(4, 3, 8, 8)


# --------------------------------------------------------------------------------------------------- decoder inputs


def speecht5(seed: int, layers: int = 2) -> SpeechT5ForTextToSpeech:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 4, "vocab_size": 20}
    sizes = {"hidden_size": 8, "encoder_layers": layers, "decoder_layers": layers, "speech_decoder_prenet_units": 8}
    widths = {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "speech_decoder_postnet_units": 8, "speaker_embedding_dim": 8}
    dropouts = ("hidden", "positional", "attention", "activation", "speech_decoder_prenet")
    still: dict[str, Any] = {f"{part}_dropout": 0.0 for part in dropouts} | {"use_guided_attention_loss": False}
    return seeded(lambda: SpeechT5ForTextToSpeech(SpeechT5Config(**sizes, **heads, **widths, **still)), seed).eval()


def spectrograms(padding: int = 0) -> dict[str, Tensor]:
    """Twelve frames for six tokens, so that the decoder's six positions are as many as the encoder's."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randn(5, 12, 4, generator=generator)
    labels[1, 8:] = -100
    mask = torch.ones(5, 6, dtype=torch.int64)
    mask[0, 4:] = 0
    return {
        "input_ids": torch.randint(3, 20, (5, 6), generator=generator),
        "attention_mask": mask,
        "labels": torch.cat([labels, torch.full((5, padding, 4), -100.0)], 1),
        "speaker_embeddings": torch.randn(5, 8, generator=generator),
    }


@pytest.mark.parametrize("given", [False, True], ids=["mask of the labels", "mask of the batch"])
def test_a_decoder_of_spectrograms_gets_one_frame_of_two_and_their_mask(given: bool) -> None:
    batch = spectrograms()
    mask = torch.ones(5, 12, dtype=torch.int64)
    if given:
        mask[2, 5:] = 0
        batch["decoder_attention_mask"] = mask
    else:
        mask[1, 8:] = 0
    seen = seen_by_target(batch, speecht5(0))
    values, of_frames = shift_spectrograms_right(batch["labels"], 2, mask)
    assert torch.equal(seen["decoder_input_values"], values)
    assert torch.equal(seen["decoder_attention_mask"], of_frames)


def test_padded_spectrograms_change_no_similarity_of_the_decoder() -> None:
    def similarity(padding: int) -> float:
        layers: Any = {f"{side}_layers": ["decoder_hidden_states"] for side in ("target", "guide")}
        target, batch = speecht5(0), spectrograms(padding)
        guidance = GuidanceLoss(
            target, speecht5(1), GuidanceConfig(sample_axis="token", measure="linear_cka", **layers)
        )
        with guidance.watch(batch) as watched:
            target(**watched.inputs)
        return watched.loss.item()

    assert 0.01 < similarity(0) == pytest.approx(similarity(4), abs=1e-6) == pytest.approx(similarity(20), abs=1e-6)


# ------------------------------------------------------------------------------------------------------------ noise


def test_noise_replaces_token_ids_by_ids_of_the_vocabulary_and_leaves_the_rest() -> None:
    ids = torch.zeros(64, 32, dtype=torch.int32)
    batch = {"input_ids": ids, "decoder_input_ids": ids, "attention_mask": MASK, "labels": IDS, "name": "x"}
    noisy = noise_like(batch, 5, generator_for(0))
    for name in ("input_ids", "decoder_input_ids"):
        counts = noisy[name].flatten().bincount()
        assert len(counts) == 5
        assert (counts / ids.numel()).numpy() == pytest.approx(0.2, abs=0.03)
        assert (noisy[name].dtype, noisy[name].shape) == (torch.int32, ids.shape)
    assert not torch.equal(noisy["input_ids"], noisy["decoder_input_ids"])
    assert all(noisy[name] is batch[name] for name in ("attention_mask", "labels", "name"))
    assert batch["input_ids"] is ids
    assert not ids.any()


def test_without_a_vocabulary_noise_stays_within_the_ids_of_the_batch() -> None:
    noisy = noise_like({"input_ids": IDS.repeat(50, 1)}, None, generator_for(0))["input_ids"]
    assert (noisy.min(), noisy.max()) == (0, 11)


@pytest.mark.parametrize("name", ["pixel_values", "inputs_embeds"])
def test_noise_for_images_is_the_papers(name: str) -> None:
    noise = noise_like({name: torch.zeros(16, 3, 32, 32, dtype=torch.float64)}, None, generator_for(0))[name]
    assert noise.dtype == torch.float64
    # of N(0, 1 + 0.1²) clamped to [0, 1]: half is 0, and P(z > 1 / √1.01) = 0.1598 is 1
    assert (noise == 0).double().mean().item() == pytest.approx(0.5, abs=0.01)
    assert (noise == 1).double().mean().item() == pytest.approx(0.1598, abs=0.01)
    assert (noise.min(), noise.max()) == (0, 1)


def test_the_guides_own_images_are_the_same_noise_in_their_size() -> None:
    batch = {"pixel_values": torch.zeros(2, 3, 4, 4), "guide_pixel_values": torch.zeros(2, 3, 8, 8), "labels": IDS}
    noisy = noise_like(batch, None, generator_for(0))
    ours, theirs = noisy["pixel_values"], noisy["guide_pixel_values"]
    assert torch.equal(theirs, ours.repeat_interleave(2, -1).repeat_interleave(2, -2))
    assert ours.std() > 0.3
    assert not batch["guide_pixel_values"].any()


def test_noise_is_a_function_of_its_generator() -> None:
    batch = {"input_ids": IDS}
    first, again, other = (noise_like(batch, 1000, generator_for(seed))["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"x": PIXELS}, r"noise replaces one of input_ids, pixel_values, inputs_embeds; the batch has \['x'\]"),
        (
            {"input_ids": IDS, "guide_input_ids": IDS},
            r"both networks cannot see the same noise: the batch has \['guide_input_ids'\] for the guide alone",
        ),
        ({"input_ids": IDS, "guide_pixel_values": PIXELS}, r"has \['guide_pixel_values'\] for the guide alone"),
    ],
)
def test_a_batch_that_noise_cannot_replace_is_an_error(batch: dict[str, Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        noise_like(batch, 17, generator_for(0))


# --------------------------------------------------------------------------------------------------------- shuffling


@pytest.mark.parametrize("rows", [2, 3, 8, 257])
def test_shuffling_gives_every_row_another_one_in_all_columns_alike(rows: int) -> None:
    for seed in range(20):
        batch = {"input_ids": torch.arange(rows)[:, None], "weights": torch.arange(rows).double(), "scale": 3}
        shuffled = shuffle_rows({**batch, "temperature": torch.tensor(2.0)}, generator_for(seed))
        order = shuffled["input_ids"].flatten()
        assert (order != torch.arange(rows)).all()
        assert torch.equal(order.sort().values, torch.arange(rows))
        assert torch.equal(shuffled["weights"], order.double())
        assert (shuffled["scale"], shuffled["temperature"].item()) == (3, 2.0)


def test_every_other_row_is_as_likely() -> None:
    counts = torch.zeros(4, 4)
    for seed in range(600):
        order = shuffle_rows({"input_ids": torch.arange(4)[:, None]}, generator_for(seed))["input_ids"].flatten()
        counts[torch.arange(4), order] += 1
    assert counts.diagonal().sum() == 0
    assert (counts[~torch.eye(4, dtype=torch.bool)] / 600).numpy() == pytest.approx(1 / 3, abs=0.08)


def test_rows_whose_positions_are_compared_are_exchanged_with_rows_of_their_length() -> None:
    lengths = torch.tensor([5, 3, 3, 5, 4, 3, 4, 5, 2, 4, 3])  # one row of 2, which no other equals
    batch = {"input_ids": torch.arange(11)[:, None].expand(-1, 5), "attention_mask": torch.arange(5) < lengths[:, None]}
    seen = set()
    for seed in range(50):
        shuffled = shuffle_rows(batch, generator_for(seed), batch, 0.1)
        order = shuffled["input_ids"][:, 0]
        assert torch.equal(shuffled["attention_mask"], batch["attention_mask"])
        assert torch.equal(order.sort().values, torch.arange(11))
        assert ((order != torch.arange(11)) == (lengths != 2)).all()
        seen.add(tuple(order.tolist()))
    assert 12 < len(seen) <= 2 * 6 * 2  # cycles of three, four and three rows


def test_of_encoder_and_decoder_both_lengths_have_to_be_equal() -> None:
    encoder, decoder = torch.tensor([3, 3, 2, 2, 3, 3]), torch.tensor([1, 2, 1, 1, 1, 2])
    batch = {
        "input_ids": torch.arange(6)[:, None],
        "attention_mask": torch.arange(3) < encoder[:, None],
        "decoder_attention_mask": torch.arange(2) < decoder[:, None],
    }
    order = shuffle_rows(batch, generator_for(0), batch)["input_ids"].flatten()
    assert order.tolist() == [4, 5, 3, 2, 0, 1]


def test_rows_without_padding_are_exchanged_as_they_always_were() -> None:
    ids = {"input_ids": torch.arange(12)[:, None]}
    expected = shuffle_rows(ids, generator_for(7))["input_ids"]
    for mask in ({}, {"attention_mask": torch.ones(12, 1)}):
        assert torch.equal(shuffle_rows(ids, generator_for(7), ids | mask)["input_ids"], expected)


def test_a_batch_in_which_many_rows_have_a_length_of_their_own_is_an_error() -> None:
    batch = {"input_ids": torch.zeros(5, 5), "attention_mask": torch.ones(5, 5).tril()}
    words = (
        r"guide_input='shuffled' exchanges rows of equal length .* but 5 of the batch's 5 rows have a length that no"
    )
    with pytest.raises(ValueError, match=words):
        shuffle_rows(batch, generator_for(0), batch, 0.1)
    assert torch.equal(shuffle_rows(batch, generator_for(0), batch)["attention_mask"], batch["attention_mask"])


# ------------------------------------------------------------------------------------------------------ vocabularies


def test_the_vocabulary_is_the_configs_and_unknown_without_one() -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    assert vocabulary_size(gpt2(vocabulary=23)) == 23
    assert vocabulary_size(get_peft_model(llama(vocabulary=19), LoraConfig(target_modules=["q_proj"], r=2))) == 19
    assert vocabulary_size(ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8))) is None
    assert vocabulary_size(nn.Identity()) is None


def test_other_vocabularies_without_columns_for_the_guide_are_an_error() -> None:
    words = r"the target's vocabulary has 17 tokens and the guide's 23: .*ids and guide_attention_mask\. .*=True"
    with pytest.raises(ValueError, match=words):
        check_vocabularies(gpt2(), llama(vocabulary=23), ["input_ids", "labels"])


@pytest.mark.parametrize(
    ("guide", "columns"),
    [
        (llama(), ["input_ids"]),
        (llama(vocabulary=23), ["input_ids", "guide_input_ids"]),
        (nn.Identity(), ["input_ids"]),
    ],
    ids=["same size", "own columns", "none known"],
)
def test_vocabularies_that_may_go_together_pass(guide: nn.Module, columns: list[str]) -> None:
    check_vocabularies(gpt2(vocabulary=llama_config().vocab_size), guide, columns)


def test_the_guides_own_columns_have_its_input_and_the_targets_rows() -> None:
    ids = token_batch(8)["input_ids"]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    check_own_columns(batch)
    check_own_columns({**batch, "guide_input_ids": ids})
    check_own_columns({**batch, "guide_x": torch.zeros(8, 3)})
    with pytest.raises(
        ValueError, match=r"columns have 8 rows and the guide's \(guide_input_ids\) 5: both networks need"
    ):
        check_own_columns({**batch, "guide_input_ids": ids[:5]})
    words = (
        r"the batch has guide_attention_mask, but no input for the guide alone, .*: add guide_input_ids, or leave them"
    )
    with pytest.raises(ValueError, match=words):
        check_own_columns({**batch, "guide_attention_mask": torch.ones_like(ids)})


def test_rows_of_packed_documents_are_not_counted() -> None:
    ids, positions = torch.arange(12)[None], torch.tensor([[*range(4), *range(8)]])
    check_own_columns({"input_ids": ids, "position_ids": positions, "guide_input_ids": ids.reshape(2, 6)})
    check_own_columns({"input_ids": ids.reshape(2, 6), "guide_input_ids": ids, "guide_position_ids": positions})
