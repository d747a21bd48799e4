"""The guide's side of a step: its randomness, its columns, its forward on padded and packed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import VOCABULARY, gpt2, llama, seeded, t5, token_batch, token_rows
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    BlenderbotModel,
    DataCollatorWithFlattening,
    DynamicCache,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from hf_guidance import GuidanceConfig, GuidanceLoss
from hf_guidance.features.reader import LayerReader
from hf_guidance.guide.forward import (
    accepted_columns,
    forward,
    forward_arguments,
    generator_for,
    guide_batch,
    rows_for_guide,
    seen_by_target,
)
from hf_guidance.guide.inputs import noise_like, shuffle_rows

IDS, MASK, PIXELS = torch.arange(12).reshape(4, 3), torch.ones(4, 3, dtype=torch.int64), torch.zeros(4, 3, 8, 8)
VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


def documents(*lengths: int) -> list[dict[str, Any]]:
    rows = token_rows(len(lengths), max(lengths))
    return [{name: value[:n].tolist() for name, value in row.items()} for row, n in zip(rows, lengths, strict=True)]


def states(guide: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    with LayerReader(guide, ["hidden_states"], "guide").reading(lambda _, output: output) as read, torch.no_grad():
        forward(guide, inputs)
    return list(read.values())


@pytest.mark.parametrize("guide", [llama(), gpt2().transformer], ids=["rotary", "learned positions"])
def test_packed_documents_give_the_features_of_each_alone(guide: PreTrainedModel) -> None:
    rows = documents(3, 7, 5)
    guide.eval()
    packed = states(guide, DataCollatorWithFlattening(return_tensors="pt")(rows))
    alone = [states(guide, {"input_ids": torch.tensor([row["input_ids"]])}) for row in rows]
    for layer, together in enumerate(packed):
        torch.testing.assert_close(together, torch.cat([each[layer] for each in alone], 1))


def test_the_guidance_loss_of_packed_documents_is_that_of_padded_ones() -> None:
    rows, losses = documents(4, 6, 6), []
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    mask = torch.arange(6) < torch.tensor([[4], [6], [6]])
    for batch in (
        DataCollatorWithFlattening(return_tensors="pt")(rows),
        {"input_ids": ids, "attention_mask": mask * 1},
    ):
        target = gpt2()
        loss = GuidanceLoss(target, llama(), GuidanceConfig(sample_axis="token"))
        with loss.watch(batch) as watched:
            target(**watched.inputs, use_cache=False)
        losses.append(watched.loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("guide", [llama(), gpt2(), t5()], ids=lambda guide: type(guide).__name__)
def test_no_guide_makes_a_cache(guide: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DynamicCache, "__init__", lambda *args, **kwargs: pytest.fail("a cache"))
    inputs = {"input_ids": torch.arange(5)[None]}
    forward(guide, inputs | ({"decoder_input_ids": inputs["input_ids"]} if guide.config.is_encoder_decoder else {}))


def test_a_guide_that_takes_no_use_cache_is_given_none() -> None:
    seen: dict[str, Any] = {}

    class Own(nn.Module):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
            seen.update(kwargs)
            return input_ids

    forward(Own(), {"input_ids": torch.arange(5)[None]})
    assert seen == {}


def test_a_padded_batch_of_torchs_own_encoder_is_read_layer_by_layer() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 8)
            self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layers(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)

    fast = torch.backends.mha.get_fastpath_enabled()
    lengths, losses = torch.tensor([5, 2, 4, 1, 3, 5, 4, 2]), []
    guidance = GuidanceLoss(gpt2(), seeded(Encoder, 0), GuidanceConfig(guide_layers=["layers.layers.*"]))
    for length in (5, 9):
        ids = token_batch(8, length)["input_ids"][:, :5]
        batch = {"input_ids": torch.nn.functional.pad(ids, (0, length - 5)), "labels": ids}
        batch["input_ids"][:, :5] = token_batch(8, 5)["input_ids"]
        batch["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
        with guidance.watch(batch) as watched:
            guidance.target(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        losses.append(watched.loss)
    torch.testing.assert_close(*losses)
    assert torch.backends.mha.get_fastpath_enabled() == fast


class Plain(nn.Module):
    """A network that names its input as it likes."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return x


class AnyKeywords(nn.Module):
    def forward(self, **inputs: Any) -> Any:
        return inputs


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


def test_a_guide_is_not_given_the_columns_of_a_decoder_or_of_a_text_that_it_has_not() -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS, "pixel_values": PIXELS}
    assert guide_batch(batch, t5(), t5()).keys() == {*batch, "decoder_input_ids", "decoder_attention_mask"}
    assert guide_batch(batch, t5(), llama()).keys() == batch.keys()
    vit = ViTModel(ViTConfig(image_size=8, patch_size=4, **VIT))
    assert guide_batch(batch, t5(), vit).keys() == {"labels", "pixel_values"}
    assert guide_batch({"pixel_values": PIXELS, "attention_mask": MASK}, t5(), vit).keys() >= {"attention_mask"}


def test_a_network_that_is_no_guide_is_called_by_its_role_where_it_takes_nothing_of_the_batch() -> None:
    batch = {"other": IDS}
    with pytest.raises(ValueError, match=r"the target \(Plain\) takes .*: name the columns after its arguments\.$"):
        forward_arguments(Plain(), batch, "target")
    with pytest.raises(ValueError, match=r"the guide \(Plain\) takes .* after its arguments, prefixed with 'guide_'"):
        forward_arguments(Plain(), batch)


def test_of_no_row_the_guide_runs_on_one_that_is_not_compared() -> None:
    batch = {"input_ids": IDS, "scale": 2.0}
    assert rows_for_guide(batch, None) == (batch, None)
    taken, rows = rows_for_guide(batch, torch.tensor([1, 3]))
    assert torch.equal(taken["input_ids"], IDS[[1, 3]])
    assert rows is None
    taken, rows = rows_for_guide(batch, torch.tensor([], dtype=torch.int64))
    assert torch.equal(taken["input_ids"], IDS[:1])
    assert rows is not None
    assert rows.shape == (0,)
