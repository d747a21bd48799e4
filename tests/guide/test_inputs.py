"""Inputs of the guide: its columns, noise, shuffled rows, and the check of the vocabularies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import gpt2, llama, llama_config, seeded, t5, token_batch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    BlenderbotModel,
    SpeechT5Config,
    SpeechT5ForTextToSpeech,
    TimmWrapperConfig,
    ViTConfig,
    ViTModel,
)
from transformers.models.speecht5.modeling_speecht5 import shift_spectrograms_right

from hf_guidance import GuidanceConfig, GuidanceLoss, load_guide
from hf_guidance.guide.forward import (
    accepted_columns,
    forward,
    forward_arguments,
    generator_for,
    guide_batch,
    seen_by_target,
)
from hf_guidance.guide.inputs import check_own_columns, check_vocabularies, noise_like, shuffle_rows, vocabulary_size

IDS, MASK, PIXELS = torch.arange(12).reshape(4, 3), torch.ones(4, 3, dtype=torch.int64), torch.zeros(4, 3, 8, 8)


class Plain(nn.Module):
    """A network that names its input as it likes."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return x


class AnyKeywords(nn.Module):
    def forward(self, **inputs: Any) -> Any:
        return inputs


# ------------------------------------------------------------------------------------------------------- randomness


def draw(*key: int) -> list[float]:
    return torch.rand(4, generator=generator_for(*key)).tolist()


def test_the_same_key_draws_the_same_and_every_part_of_it_counts() -> None:
    keys = [(7, 0, 0, 0), (8, 0, 0, 0), (7, 1, 0, 0), (7, 0, 1, 0), (7, 0, 0, 1), (7, 0, 0, 0, 1), (0, 7, 0, 0), (7,)]
    draws = [draw(*key) for key in keys]
    assert draws == [draw(*key) for key in keys]
    assert len({tuple(each) for each in draws}) == len(keys)


def test_steps_one_after_another_are_uncorrelated_and_no_seed_is_too_large() -> None:
    first = torch.tensor([draw(0, step)[0] for step in range(400)])
    assert first.mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1].abs() < 0.15
    assert draw(2**62, 2**62) != draw(2**62, 2**62 + 1)


def test_drawing_leaves_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    noise_like({"input_ids": IDS, "pixel_values": PIXELS}, 17, generator_for(0))
    shuffle_rows({"input_ids": IDS}, generator_for(0))
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------- columns


def test_the_guide_is_given_its_own_columns_and_no_others() -> None:
    batch = {"input_ids": IDS, "labels": IDS, "guide_input_ids": IDS + 1, "guide_attention_mask": MASK}
    own = guide_batch(batch, gpt2(), llama())
    assert own.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(own["input_ids"], IDS + 1)


def test_without_columns_of_its_own_the_guide_is_given_the_targets() -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    given = guide_batch(batch, gpt2(), llama())
    assert given.keys() == batch.keys()
    assert given is not batch


def test_the_decoder_inputs_of_an_encoder_decoder_are_its_labels_shifted() -> None:
    labels = torch.tensor([[5, 6, -100], [7, 8, 9]])  # decoder_start_token_id and pad_token_id are 0
    seen = seen_by_target({"input_ids": IDS[:2], "labels": labels}, t5())
    assert seen["decoder_input_ids"].tolist() == [[0, 5, 6], [0, 7, 8]]
    own = {"labels": labels, "decoder_input_ids": IDS}
    assert seen_by_target(own, t5())["decoder_input_ids"] is IDS
    assert "decoder_input_ids" not in seen_by_target({"labels": labels}, gpt2())


def test_an_encoder_decoder_that_shifts_its_labels_itself_is_read_by_its_start_token() -> None:
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 20}
    config = BlenderbotConfig(**sizes, **heads, decoder_start_token_id=4, pad_token_id=1)
    labels = torch.tensor([[5, 6, -100], [7, 8, 9]])
    seen = seen_by_target({"input_ids": IDS[:2], "labels": labels}, BlenderbotForConditionalGeneration(config))
    assert seen["decoder_input_ids"].tolist() == [[4, 5, 6], [4, 7, 8]]
    assert seen["decoder_attention_mask"].tolist() == [[True, True, False], [True, True, True]]
    assert "decoder_input_ids" not in seen_by_target({"labels": torch.zeros(2, 3)}, BlenderbotModel(config))
    embedded = {"labels": labels, "decoder_inputs_embeds": torch.zeros(2, 3, 8)}
    assert seen_by_target(embedded, t5()).keys() == embedded.keys()
    classifier = BartForSequenceClassification(BartConfig(**sizes, **heads, num_labels=3))
    assert "decoder_input_ids" not in seen_by_target({"labels": torch.zeros(2, 1).long()}, classifier)
    given = {"labels": labels, "decoder_attention_mask": MASK[:2]}
    assert seen_by_target(given, t5())["decoder_attention_mask"] is given["decoder_attention_mask"]


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


def test_prompts_and_completions_that_a_target_sees_together_are_joined() -> None:
    parts = {"prompt_ids": IDS, "prompt_mask": MASK, "completion_ids": IDS[:, :2], "completion_mask": MASK[:, :2]}
    seen = seen_by_target(parts, gpt2())
    assert torch.equal(seen["input_ids"], torch.cat([IDS, IDS[:, :2]], 1))
    assert torch.equal(seen["attention_mask"], torch.cat([MASK, MASK[:, :2]], 1))
    assert guide_batch(parts, gpt2(), llama()).keys() == seen.keys()
    assert seen_by_target({**parts, "input_ids": IDS}, gpt2())["input_ids"] is IDS
    assert "input_ids" not in seen_by_target({"prompt_ids": IDS}, gpt2())


@pytest.mark.parametrize("guide", [llama(), get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], r=2))])
def test_labels_are_no_columns_of_a_guide(guide: nn.Module) -> None:
    assert {"input_ids", "attention_mask", "inputs_embeds"} <= set(accepted_columns(guide))
    assert accepted_columns(Plain()) == ["x", "attention_mask"]
    assert accepted_columns(AnyKeywords()) == []


@pytest.mark.parametrize(
    ("guide", "columns", "args", "kwargs"),
    [
        (llama(), ["input_ids", "attention_mask", "labels", "guide"], [], ["input_ids", "attention_mask"]),
        (llama(), ["inputs_embeds", "attention_mask"], [], ["inputs_embeds", "attention_mask"]),
        (nn.Linear(3, 3), ["input_ids"], ["input_ids"], []),  # its argument is called input
        (nn.Linear(3, 3), ["pixel_values", "labels"], ["pixel_values"], []),
        (Plain(), ["input_ids"], ["input_ids"], []),
        (Plain(), ["input_ids", "attention_mask"], ["input_ids"], ["attention_mask"]),
        (Plain(), ["x", "attention_mask"], [], ["x", "attention_mask"]),
        (Plain(), ["x", "input_ids"], [], ["x"]),
    ],
)
def test_the_guide_is_called_with_what_it_takes_by_name_else_with_its_one_input(
    guide: nn.Module, columns: list[str], args: list[str], kwargs: list[str]
) -> None:
    batch = {name: torch.full((2, 2), float(i)) for i, name in enumerate(columns)}
    given = forward_arguments(guide, batch)
    assert [value.tolist() for value in given[0]] == [batch[name].tolist() for name in args]
    assert {k: v.tolist() for k, v in given[1].items()} == {name: batch[name].tolist() for name in kwargs}


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (Plain(), r"the guide \(Plain\) takes \['x', 'attention_mask'\], but the batch has \['labels', 'signal'\]"),
        (AnyKeywords(), r"the guide \(AnyKeywords\) takes \[\], .* prefixed with 'guide_'"),
    ],
)
def test_a_batch_with_nothing_for_the_guide_is_an_error(guide: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        forward_arguments(guide, {"signal": torch.ones(2), "labels": torch.ones(2)})


VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
TIMMS_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 1}


@pytest.mark.parametrize(
    "config",
    [
        ViTConfig(image_size=16, patch_size=8, **VIT),
        TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=TIMMS_VIT),
    ],
    ids=["transformers", "timm"],
)
def test_images_of_a_size_that_the_guide_does_not_take_are_an_error_that_names_both(config: Any) -> None:
    guide = load_guide(config)
    forward(guide, {"pixel_values": torch.zeros(2, 3, 16, 16)})
    words = rf"guide \({type(guide).__name__}\) does not run on pixel_values \(2, 3, 24, 24\): .*guide_pixel_values"
    with pytest.raises(ValueError, match=words):
        forward(guide, {"pixel_values": torch.zeros(2, 3, 24, 24)})


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
    assert vocabulary_size(Plain()) is None


def test_other_vocabularies_without_columns_for_the_guide_are_an_error() -> None:
    words = r"the target's vocabulary has 17 tokens and the guide's 23: .*ids and guide_attention_mask\. .*=True"
    with pytest.raises(ValueError, match=words):
        check_vocabularies(gpt2(), llama(vocabulary=23), ["input_ids", "labels"])


@pytest.mark.parametrize(
    ("guide", "columns"),
    [(llama(), ["input_ids"]), (llama(vocabulary=23), ["input_ids", "guide_input_ids"]), (Plain(), ["input_ids"])],
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


def test_a_guide_is_not_given_the_columns_of_a_decoder_or_of_a_text_that_it_has_not() -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS, "pixel_values": PIXELS}
    assert guide_batch(batch, t5(), t5()).keys() == {*batch, "decoder_input_ids", "decoder_attention_mask"}
    assert guide_batch(batch, t5(), llama()).keys() == batch.keys()
    vit = ViTModel(ViTConfig(image_size=8, patch_size=4, **VIT))
    assert guide_batch(batch, t5(), vit).keys() == {"labels", "pixel_values"}
    assert guide_batch({"pixel_values": PIXELS, "attention_mask": MASK}, t5(), vit).keys() >= {"attention_mask"}
