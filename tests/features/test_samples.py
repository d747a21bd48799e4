"""Samples: rows or tokens, and that padding, its amount and its side are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_guidance.features.choices import choose_rows
from hf_guidance.features.conventions import Conventions
from hf_guidance.features.distributed import Ranks
from hf_guidance.features.samples import Samples, choose_within_rows
from hf_guidance.similarity.layers import gram

ROWS, LENGTH, WIDTH = 9, 7, 5
FIRST = Conventions(nn.Conv2d(1, WIDTH, 1), {})  # a network whose maps have WIDTH channels
LENGTHS = torch.tensor([7, 3, 5, 1, 6, 4, 2, 7, 5])
Batch = dict[str, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded(content: Tensor, left: Tensor | int = 0, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Rows of `content` (ROWS, LENGTH, …), cut to LENGTHS and put `left` places into rows of junk."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(content), length, *content.shape[2:])
    if content.is_floating_point():
        rows = 1e3 * torch.randn(shape, generator=generator, dtype=content.dtype)
    else:
        rows = torch.randint(100, shape, generator=generator)
    for row, source, n, start in zip(rows, content, LENGTHS, torch.as_tensor(left).expand(ROWS), strict=True):
        row[start : start + n] = source[:n]
    return rows


def network(left: Tensor | int = 0, length: int = LENGTH, seed: int = 0, ids_seed: int = 0) -> tuple[Batch, Tensor]:
    """A batch and a layer's features on it, which depend on neither side nor amount nor content of the padding."""
    ids = torch.randint(100, (ROWS, LENGTH), generator=torch.Generator().manual_seed(ids_seed))
    places, starts = torch.arange(length), torch.as_tensor(left).expand(ROWS)[:, None]
    batch = {
        "input_ids": padded(ids, left, length, seed),
        "attention_mask": ((places >= starts) & (places < starts + LENGTHS[:, None])).long(),
    }
    return batch, padded(normal(ROWS, LENGTH, WIDTH), left, length, seed)


PADDINGS: dict[str, dict[str, Any]] = {
    "right, other junk": {"seed": 1},
    "right, longer": {"length": 12, "seed": 2},
    "left": {"left": LENGTH - LENGTHS, "seed": 3},
    "left, longer": {"left": 12 - LENGTHS, "length": 12, "seed": 4},
    "both sides, ragged": {"left": torch.tensor([1, 0, 4, 9, 2, 3, 8, 5, 0]), "length": 14, "seed": 5},
}
AXES = [
    pytest.param({"axis": "sequence"}, id="sequence"),
    pytest.param({"axis": "token"}, id="token"),
    pytest.param({"axis": "token", "max_tokens": 12, "seed": 3}, id="token-chosen"),
]


# -------------------------------------------------------------------------------------------------------- the axes


def test_on_the_sequence_axis_a_row_is_a_sample() -> None:
    features = normal(ROWS, LENGTH, WIDTH)
    batch = {"input_ids": torch.ones(ROWS, LENGTH, dtype=torch.int64)}
    torch.testing.assert_close(Samples(batch).layer("h", features).values, gram(features.flatten(1)))


def test_on_the_sequence_axis_padding_is_masked() -> None:
    batch, features = network()
    expected = gram(features, torch.arange(LENGTH) < LENGTHS[:, None])
    torch.testing.assert_close(Samples(batch).layer("h", features).values, expected)


def test_on_the_token_axis_every_valid_position_is_a_sample() -> None:
    batch, features = network()
    tokens = torch.cat([row[:n] for row, n in zip(features, LENGTHS, strict=True)])
    torch.testing.assert_close(Samples(batch, "token").layer("h", features).gram(), gram(tokens))


def test_on_the_token_axis_without_a_mask_every_position_is_a_sample() -> None:
    features = normal(ROWS, LENGTH, WIDTH)
    kernel = Samples({"input_ids": torch.ones(ROWS, LENGTH, dtype=torch.int64)}, "token").layer("h", features).gram()
    torch.testing.assert_close(kernel, gram(features.flatten(0, 1)))


def test_of_an_image_a_token_is_a_place() -> None:
    features = normal(2, WIDTH, 3, 4)
    places = torch.stack([features[b, :, i, j] for b in range(2) for i in range(3) for j in range(4)])
    torch.testing.assert_close(
        Samples({"pixel_values": torch.ones(2, 3, 8, 8)}, "token", conventions=FIRST).layer("h", features).gram(),
        gram(places),
    )


def test_a_layer_without_positions_is_compared_row_by_row_whatever_the_mask() -> None:
    batch, _ = network()
    pooled = normal(ROWS, WIDTH)
    torch.testing.assert_close(Samples(batch).layer("pooler", pooled).values, gram(pooled))


# ----------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("settings", AXES)
@pytest.mark.parametrize("padding", PADDINGS)
def test_amount_side_and_content_of_the_padding_do_not_matter(padding: str, settings: dict[str, Any]) -> None:
    (batch, features), (other, other_features) = network(), network(**PADDINGS[padding])
    kernel = Samples(batch, **settings).layer("h", features).values
    torch.testing.assert_close(Samples(other, **settings).layer("h", other_features).values, kernel)


def test_where_the_padding_begins_does_matter() -> None:
    batch, features = network()
    shorter = {**batch, "attention_mask": batch["attention_mask"].clone()}
    shorter["attention_mask"][0, -1] = 0
    assert not torch.allclose(Samples(shorter).layer("h", features).values, Samples(batch).layer("h", features).values)


@pytest.mark.parametrize("settings", AXES)
def test_order_of_the_rows_does_not_matter(settings: dict[str, Any]) -> None:
    batch, features = network()
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    permuted = {name: value[order] for name, value in batch.items()}
    before, after = (
        Samples(batch, **settings).layer("h", features).values,
        Samples(permuted, **settings).layer("h", features[order]).values,
    )
    if settings["axis"] == "sequence":
        torch.testing.assert_close(after, before[order][:, order])
    else:  # the same tokens, in whatever order
        torch.testing.assert_close(after.flatten().sort().values, before.flatten().sort().values)


# ------------------------------------------------------------------------------------------ some rows, some positions


@pytest.mark.parametrize("settings", AXES)
def test_some_rows_are_compared_as_a_batch_of_them_alone(settings: dict[str, Any]) -> None:
    batch, features = network()
    rows = torch.tensor([1, 2, 5, 8])
    alone = Samples({name: value[rows] for name, value in batch.items()}, **settings)
    some = Samples(batch, rows=rows, **settings)
    assert some.count == 4
    torch.testing.assert_close(some.layer("h", features).values, alone.layer("h", features[rows]).values)


def test_of_no_row_nothing_is_compared() -> None:
    batch, features = network()
    samples = Samples(batch, "token", rows=torch.tensor([], dtype=torch.int64))
    assert samples.count == 0
    assert samples.layer("h", features).samples == 0


@pytest.mark.parametrize("padding", ["none", *PADDINGS])
@pytest.mark.parametrize("axis", ["sequence", "token"])
def test_the_first_valid_positions_are_left_out_wherever_they_stand(padding: str, axis: str) -> None:
    batch, features = network(**PADDINGS.get(padding, {}))
    plain, plain_features = network()
    later = {name: value[:, 2:] for name, value in plain.items()}
    expected = Samples(later, axis).layer("h", plain_features[:, 2:]).gram()
    torch.testing.assert_close(Samples(batch, axis, skip_first=2).layer("h", features).gram(), expected)


def test_without_a_mask_the_first_positions_are_left_out_too_but_not_those_of_an_image_or_a_pooled_layer() -> None:
    ids, features = torch.ones(ROWS, LENGTH, dtype=torch.int64), normal(ROWS, LENGTH, WIDTH)
    for axis in ("sequence", "token"):
        skipping, all_of_them = (
            Samples({"input_ids": ids}, axis, skip_first=skip, conventions=FIRST) for skip in (1, 0)
        )
        expected = all_of_them.layer("h", features[:, 1:]).gram()
        torch.testing.assert_close(skipping.layer("h", features).gram(), expected)
        image = normal(ROWS, WIDTH, 2, 3)
        torch.testing.assert_close(skipping.layer("i", image).gram(), all_of_them.layer("i", image).gram())
    pooled = normal(ROWS, WIDTH)
    torch.testing.assert_close(Samples({"input_ids": ids}, skip_first=1).layer("p", pooled).values, gram(pooled))


def test_the_places_of_an_image_are_those_of_a_vision_transformer_without_its_first_token() -> None:
    images = {"pixel_values": normal(2, 3, 8, 8)}
    tokens, places = normal(2, 7, WIDTH), normal(2, WIDTH, 2, 3)
    samples = Samples(images, "token", skip_first=1)
    guide = Samples(images, "token", skip_first=1, like=samples, conventions=FIRST)
    pairs = [("t", "g")]
    samples.check_aligned(pairs, {"t": samples.layers("t", tokens)}, guide, {"g": guide.layers("g", places)})


def test_some_position_has_to_be_left() -> None:
    batch, features = network()
    with pytest.raises(ValueError, match=r"skip_first_positions is 7, but layer 'h' has 7 positions: lower it"):
        Samples(batch, skip_first=7).layer("h", features)


# ------------------------------------------------------------------------------------------------ choice of tokens


def chosen(
    batch: Batch, layer: str = "h", shape: tuple[int, int] | None = None, **settings: Any
) -> set[tuple[int, int]]:
    """(row, position) of the tokens that are compared: those that get a gradient."""
    features = normal(*(shape or batch["input_ids"].shape), 3, seed=9).requires_grad_()
    Samples(batch, "token", **settings).layer(layer, features).values.square().sum().backward()
    return {(int(row), int(position)) for row, position in features.grad.abs().sum(-1).nonzero()}


def contents(batch: Batch, **settings: Any) -> list[tuple[int, int]]:
    """(token id, place among its row's valid ones) of the tokens that are compared."""
    places = batch["attention_mask"].cumsum(1) - 1
    return sorted((int(batch["input_ids"][spot]), int(places[spot])) for spot in chosen(batch, **settings))


def test_more_tokens_than_the_maximum_are_cut_down_to_it_and_fewer_are_all_kept() -> None:
    batch, features = network()
    total = int(LENGTHS.sum())
    for most in (4, 12, total - 1, total, total + 1, 1000):
        assert len(chosen(batch, max_tokens=most)) == min(most, total)
        assert len(Samples(batch, "token", most).layer("h", features).values) == min(most, total)


def test_no_padding_is_ever_chosen() -> None:
    batch, _ = network(left=torch.tensor([1, 0, 4, 9, 2, 3, 8, 5, 0]), length=14)
    valid = {(int(row), int(position)) for row, position in batch["attention_mask"].nonzero()}
    assert all(chosen(batch, max_tokens=30, seed=seed) < valid for seed in range(5))


def test_the_choice_depends_on_the_seed_and_on_nothing_that_changes_between_calls() -> None:
    batch, _ = network()
    choices = [frozenset(chosen(batch, max_tokens=12, seed=seed)) for seed in (0, 1, 2**62, 0)]
    assert choices[0] == choices[3]
    assert len(set(choices)) == 3


@pytest.mark.parametrize("padding", PADDINGS)
def test_the_choice_is_of_the_same_tokens_however_they_are_padded(padding: str) -> None:
    settings = {"max_tokens": 12, "seed": 3}
    assert contents(network(**PADDINGS[padding])[0], **settings) == contents(network()[0], **settings)


def test_the_choice_is_of_the_same_tokens_in_whatever_order_the_rows_come() -> None:
    batch, settings = network()[0], {"max_tokens": 12, "seed": 3}
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    assert contents({name: value[order] for name, value in batch.items()}, **settings) == contents(batch, **settings)


def test_the_choice_depends_on_what_the_rows_hold() -> None:
    settings = {"max_tokens": 12, "seed": 3}
    assert chosen(network(ids_seed=0)[0], **settings) != chosen(network(ids_seed=1)[0], **settings)


def test_every_token_is_chosen_equally_often_over_the_seeds() -> None:
    batch, counts = network()[0], torch.zeros(ROWS, LENGTH)
    seeds, share = 300, 12 / LENGTHS.sum()
    for seed in range(seeds):
        for spot in chosen(batch, max_tokens=12, seed=seed):
            counts[spot] += 1
    deviation = (counts[batch["attention_mask"].bool()] - seeds * share).abs() / (seeds * share * (1 - share)).sqrt()
    assert deviation.max() < 4.5


@pytest.mark.parametrize("name", ["pixel_values", "inputs_embeds"])
def test_rows_that_hold_numbers_are_told_apart_too(name: str) -> None:
    batch = {"attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.int64), name: normal(ROWS, LENGTH, WIDTH).float()}
    settings: dict[str, Any] = {"shape": (ROWS, LENGTH), "max_tokens": 12}
    spots = chosen(batch, **settings)
    assert len({position for _, position in spots}) > 2
    swapped = chosen({key: value.flip(0) for key, value in batch.items()}, **settings)
    assert {(ROWS - 1 - row, position) for row, position in swapped} == spots


# ---------------------------------------------------------------------------------------------------- two networks


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("most", [12, 1000])
def test_the_guide_takes_over_the_targets_choice_however_its_rows_are_padded(padding: str, most: int) -> None:
    (batch, features), (other, other_features) = network(), network(**PADDINGS[padding], ids_seed=7)
    target = Samples(batch, "token", most, seed=3)
    guide = Samples(other, "token", most, seed=5, like=target)
    torch.testing.assert_close(guide.layer("h", other_features).values, target.layer("h", features).values)


def test_a_guide_with_other_numbers_of_tokens_is_an_error_on_the_token_axis_alone() -> None:
    batch, _ = network()
    fewer = {**batch, "attention_mask": batch["attention_mask"].clone()}
    fewer["attention_mask"][0, -1] = 0
    with pytest.raises(
        ValueError, match=r"the guide has 39 valid tokens and the target 40.* Use sample_axis='sequence'"
    ):
        Samples(fewer, "token", like=Samples(batch, "token"))
    Samples(fewer, "sequence", like=Samples(batch, "sequence"))


def test_tokens_are_known_by_whose_they_are_so_that_pairs_of_unlike_ones_are_noticed() -> None:
    batch, features = network()
    masked, unmasked = Samples(batch, "token"), Samples({"input_ids": batch["input_ids"]}, "token")
    decoder = Samples({**batch, "decoder_attention_mask": batch["attention_mask"]}, "token")
    for samples in (masked, unmasked, decoder):
        samples.layer("h", features)
    assert len({masked.positions["h"], unmasked.positions["h"], decoder.positions["h"]}) == 3


# -------------------------------------------------------------------------------------------------- encoder-decoder

LABEL_LENGTHS = torch.tensor([2, 5, 1, 5, 4, 3, 5, 2, 3])


def encoder_decoder(length: int, how: str) -> Batch:
    """Encoder rows of LENGTHS, decoder rows of LABEL_LENGTHS padded to `length`, and what tells the latter."""
    valid = torch.arange(length) < LABEL_LENGTHS[:, None]
    columns: Batch = {"decoder_input_ids": torch.ones(ROWS, length, dtype=torch.int64)}
    if how == "labels":
        columns["labels"] = torch.where(valid, 1, -100)
    if how == "mask":
        columns["decoder_attention_mask"] = valid.long()
    return {**network()[0], **columns}


@pytest.mark.parametrize("length", [5, LENGTH], ids=["other length", "the encoder's length"])
@pytest.mark.parametrize("how", ["labels", "mask", "nothing"])
def test_decoder_positions_are_masked_by_the_decoders_mask_or_its_labels(how: str, length: int) -> None:
    samples, features = Samples(encoder_decoder(length, how)), normal(ROWS, length, WIDTH)
    lengths = LABEL_LENGTHS if how != "nothing" else torch.full((ROWS,), length)
    expected = gram(features, torch.arange(length) < lengths[:, None])
    torch.testing.assert_close(samples.layer("hidden_states.1", features).values, expected)


@pytest.mark.parametrize("length", [5, LENGTH], ids=["other length", "the encoder's length"])
def test_encoder_positions_are_masked_by_the_encoders_mask(length: int) -> None:
    samples, features = Samples(encoder_decoder(length, "labels")), normal(ROWS, LENGTH, WIDTH)
    expected = gram(features, torch.arange(LENGTH) < LENGTHS[:, None])
    torch.testing.assert_close(samples.layer("encoder_hidden_states.1", features).values, expected)


def test_labels_of_a_network_without_a_decoder_mask_nothing() -> None:
    batch, features = network()
    labelled = {**batch, "labels": torch.full((ROWS, LENGTH), -100)}
    expected = Samples(batch).layer("h", features).values
    torch.testing.assert_close(Samples(labelled).layer("h", features).values, expected)


def test_encoder_and_decoder_of_one_length_have_tokens_of_their_own() -> None:
    samples = Samples(encoder_decoder(LENGTH, "labels"), "token")
    assert len(samples.layer("encoder_hidden_states.1", normal(ROWS, LENGTH, WIDTH)).values) == LENGTHS.sum()
    assert len(samples.layer("hidden_states.1", normal(ROWS, LENGTH, WIDTH)).values) == LABEL_LENGTHS.sum()


def test_padding_of_the_encoder_does_not_change_the_choice_of_the_decoders_tokens() -> None:
    decoder = {name: value for name, value in encoder_decoder(5, "labels").items() if name not in network()[0]}
    settings: dict[str, Any] = {"layer": "hidden_states.1", "shape": (ROWS, 5), "max_tokens": 9}
    longer = network(**PADDINGS["left, longer"])[0]
    assert chosen({**longer, **decoder}, **settings) == chosen({**network()[0], **decoder}, **settings)


# ----------------------------------------------------------------------------------------------------------- errors


def test_a_batch_without_tensors_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no tensor with a sample axis; it has \['scale', 'text'\]"):
        Samples({"text": ["a"], "scale": torch.tensor(1.0)})


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (torch.ones(LENGTH, ROWS, WIDTH), rf"shape \({LENGTH}, {ROWS}, {WIDTH}\)"),
        (torch.ones(ROWS), rf"shape \({ROWS},\)"),
        (torch.tensor(1.0), r"shape \(\)"),
        (None, "NoneType"),
    ],
)
def test_an_output_whose_first_axis_is_not_the_batch_is_an_error(output: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"layer 'rnn' gave {got}; expected a tensor with the batch's {ROWS} samples"):
        Samples(network()[0]).layer("rnn", output)


def test_of_a_layer_with_another_length_than_the_mask_all_positions_count_which_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (batch, _), pooled, conventions = network(), normal(ROWS, 4, WIDTH), Conventions(nn.Identity(), {})
    for _ in range(2):
        samples = Samples(batch, conventions=conventions)
        torch.testing.assert_close(samples.layer("pool of 4", pooled).values, gram(pooled))
    (words,) = caplog.messages
    assert words.startswith("Layer 'pool of 4' has 4 positions, but the mask has another number (encoder 7), so that")
    caplog.clear()
    Samples({**batch, "attention_mask": torch.ones(ROWS, LENGTH)}).layer("pool without padding", pooled)
    assert not caplog.messages


def test_an_encoders_layer_is_never_masked_by_the_decoder_nor_an_images_by_text() -> None:
    features, mask = normal(ROWS, LENGTH, WIDTH), (torch.arange(LENGTH) < LENGTHS[:, None]).long()
    decoder = {"pixel_values": normal(ROWS, 3, 8, 8), "decoder_attention_mask": mask}
    text = {"input_ids": torch.ones(ROWS, LENGTH).long(), "attention_mask": mask}
    for batch, name in ((decoder, "encoder.layer.0"), (text, "model.vision_tower.layers.0")):
        torch.testing.assert_close(Samples(batch).layer(name, features).values, gram(features))
    for batch, name in ((decoder, "decoder.h.0"), (text, "model.layers.0"), (text, "supervision.0")):
        assert not torch.allclose(Samples(batch).layer(name, features).gram(), gram(features))


def test_a_layer_without_positions_has_no_tokens() -> None:
    words = rf"layer 'pooler' gave shape \({ROWS}, {WIDTH}\), which has no positions; sample_axis='token' needs"
    with pytest.raises(ValueError, match=words):
        Samples(network()[0], "token").layer("pooler", normal(ROWS, WIDTH))


def test_a_mask_on_some_ranks_alone_is_an_error() -> None:
    class TwoRanks(OneRank):
        def numbers(self, numbers: Any, device: torch.device) -> list[list[int]]:
            return [list(numbers), [*numbers[:2], *[0] * len(numbers[2:])]]

    with pytest.raises(
        ValueError, match=r"some ranks have a mask \(encoder\) and some have none: let the data collator"
    ):
        Samples(network()[0], ranks=TwoRanks())


class OneRank(Ranks):
    """Chooses as several processes do, and is one."""

    def __init__(self) -> None:
        self.rank, self.scale, self.bytes_sent = 0, 1, 0

    def numbers(self, numbers: Any, device: torch.device) -> list[list[int]]:
        return [list(numbers)]

    def smallest(self, values: Tensor, count: int) -> Tensor:
        return values.sort().values[:count]

    def gather(self, x: Tensor, counts: Any, length: int | None = None) -> Tensor:
        return x


@pytest.mark.parametrize("most", range(1, 17))
def test_tokens_of_equal_rows_are_chosen_alike_by_one_process_and_by_ranks(most: int) -> None:
    ids = torch.randint(100, (4, 5), generator=torch.Generator().manual_seed(0))
    ids[3] = ids[1]  # so that each of its tokens is as good as one of the other row
    batch = {"input_ids": ids}
    features = torch.arange(20.0).reshape(4, 5, 1)
    found = [Samples(batch, "token", most, ranks=ranks)._tokens("a", features, None)[:2] for ranks in (None, OneRank())]
    alone, ranks = (set(zip(rows.tolist(), positions.tolist(), strict=True)) for rows, positions in found)
    assert alone == ranks
    assert {(3, place) for row, place in alone if row == 1} == {(row, place) for row, place in alone if row == 3}
    assert most - 1 <= len(alone) <= most or (len(alone), most) == (2, 1)


def test_within_rows_positions_are_chosen_up_to_a_number_and_rows_grouped_by_it() -> None:
    valid = torch.arange(6) < torch.tensor([6, 2, 5, 2, 3])[:, None]
    hashes = torch.arange(5)
    found = choose_within_rows(valid, lambda: hashes, 4, seed=1)
    assert [rows.tolist() for rows, _ in found] == [[1, 3], [4], [0, 2]]
    assert found[0][1].tolist() == [[0, 1], [0, 1]]
    for row, positions in zip(found[2][0], found[2][1], strict=True):
        assert len(positions.unique()) == 4
        assert valid[row, positions].all()
    (every,) = choose_within_rows(torch.ones(3, 4, dtype=torch.bool), lambda: hashes[:3], 4, seed=1)
    assert every[1].tolist() == [[0, 1, 2, 3]] * 3


def test_rows_of_one_number_are_chosen_too() -> None:
    ids = torch.arange(20)
    chosen = choose_rows({"user": ids}, 5, seed=3)
    assert chosen is not None
    assert len(chosen) == 5
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    again = choose_rows({"user": ids[order]}, 5, seed=3)
    assert again is not None
    assert set(ids[order][again].tolist()) == set(ids[chosen].tolist())
