"""Recurrent targets against plain loops: values, padding, cache, generation, losses, initial weights, errors."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_guidance.targets import RNNConfig, RNNForCausalLM, RNNForSequenceClassification, RNNModel
from hf_guidance.targets.configuration_plain_rnn import CELL_TYPES
from hf_guidance.targets.modeling_plain_rnn import CACHE

torch.set_num_threads(1)
VOCAB, PAD = 11, 0
MASKS = {
    "none": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    "left": [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]],
    "scattered": [[0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 1]],
}
every_cell = pytest.mark.parametrize("cell", CELL_TYPES)


def config(cell="tanh", **options):
    sizes = {"vocab_size": VOCAB, "embedding_size": 6, "hidden_size": 8, "num_hidden_layers": 3}
    return RNNConfig(**{**sizes, "cell_type": cell, "pad_token_id": PAD, **options})


def build(model_class, cell="tanh", **options):
    torch.manual_seed(0)
    # a wide start, so that the models' choices differ from token to token
    return model_class(config(cell, **{"initializer_range": 1.0, **options})).eval()


def batch(mask="none"):
    ids = torch.randint(1, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.tensor(MASKS[mask])}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_layer(layer, inputs):
    """The textbook recurrence, one row at a time: inputs (length, size) to outputs (length, hidden_size)."""
    w_x, w_h, b_x, b_h = (parameter.detach().double().numpy() for parameter in layer.parameters())
    h = c = np.zeros(layer.hidden_size)
    outputs = []
    for x in inputs:
        from_x, from_h = w_x @ x + b_x, w_h @ h + b_h
        if isinstance(layer, nn.LSTM):
            i, f, g, o = np.split(from_x + from_h, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        elif isinstance(layer, nn.GRU):
            (r_x, z_x, n_x), (r_h, z_h, n_h) = np.split(from_x, 3), np.split(from_h, 3)
            z = sigmoid(z_x + z_h)
            h = (1 - z) * np.tanh(n_x + sigmoid(r_x + r_h) * n_h) + z * h
        else:
            h = np.tanh(from_x + from_h)
        outputs.append(h)
    return np.array(outputs)


@every_cell
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_hidden_states_are_the_recurrence_over_the_valid_tokens_alone(cell, mask, use_cache):
    model, inputs = build(RNNModel, cell), batch(mask)
    outputs = model(**inputs, use_cache=use_cache, output_hidden_states=True)
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 6, 6), (2, 6, 8), (2, 6, 8), (2, 6, 8)]
    for row, valid in enumerate(inputs["attention_mask"].bool()):
        expected = model.embed_tokens.weight[inputs["input_ids"][row, valid]].detach().double().numpy()
        for index, states in enumerate(outputs.hidden_states):
            expected = numpy_layer(model.layers[index - 1], expected) if index else expected
            np.testing.assert_allclose(states[row, valid].detach().numpy(), expected, atol=1e-5)
            assert not states[row, ~valid].any()


@every_cell
@pytest.mark.parametrize("mask", ["none", "left", "right"])
def test_one_token_at_a_time_from_the_cache_is_the_whole_text_at_once(cell, mask):
    model, inputs = build(RNNForCausalLM, cell), batch(mask)
    more = torch.tensor([[3, 4], [5, 6]])
    ids = torch.cat([inputs["input_ids"], more], dim=1)
    valid = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    whole = model(ids, valid, use_cache=False).logits
    cache = model(**inputs)[CACHE]
    for position in (6, 7):
        step = model(ids[:, position : position + 1], valid[:, : position + 1], **{CACHE: cache})
        torch.testing.assert_close(step.logits[:, 0], whole[:, position], atol=1e-5, rtol=0)
    assert cache.get_seq_length() == 8


@every_cell
def test_a_row_of_padding_leaves_the_state_alone(cell):
    model, ids = build(RNNModel, cell), batch()["input_ids"]
    cache = model(ids[:, :3])[CACHE]
    before = [part.clone() for state in cache.states for part in state]
    model(ids[:, 3:], torch.tensor([[0, 0, 0], [1, 1, 1]]), cache)
    after = [part for state in cache.states for part in state]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:, 0], new[:, 0])
        assert not torch.equal(old[:, 1], new[:, 1])


def test_padding_needs_no_value_on_the_host_in_training():
    model = build(RNNForCausalLM).to("meta").train()  # reading a value of a meta tensor raises
    inputs = {name: tensor.to("meta") for name, tensor in batch("left").items()}
    model(**inputs, labels=inputs["input_ids"]).loss.backward()


def greedy(model, row, steps):
    """The plain loop: the whole text again for every token, without mask or cache."""
    ids = row[None]
    for _ in range(steps):
        best = model(ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, best[:, None]], dim=1)
    return ids[0, len(row) :]


@every_cell
def test_greedy_generation_of_a_left_padded_batch_is_the_plain_loop(cell):
    model, inputs = build(RNNForCausalLM, cell), batch("left")
    for layer in model.model.layers:
        layer.weight_hh_l0.data.mul_(4)  # so that the choice depends on more than the last token
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, 6:]
    for row, valid in enumerate(inputs["attention_mask"].bool()):
        assert torch.equal(generated[row], greedy(model, inputs["input_ids"][row, valid], 8))


@every_cell
@pytest.mark.parametrize(
    "strategy", [{"do_sample": True}, {"num_beams": 3, "do_sample": False}], ids=["sample", "beam"]
)
def test_sampling_and_beam_search_with_and_without_the_cache(cell, strategy):
    model, inputs = build(RNNForCausalLM, cell), batch("left")
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        texts.append(model.generate(**inputs, **strategy, max_new_tokens=8, use_cache=use_cache))
    assert torch.equal(*texts)
    assert len(texts[0].unique()) > 3


def test_language_model_loss_is_the_shifted_cross_entropy():
    model, inputs = build(RNNForCausalLM), batch("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    outputs = model(**inputs, labels=labels)
    logits = outputs.logits.detach().double().numpy()
    losses = [
        np.log(np.exp(logits[row, position]).sum()) - logits[row, position, labels[row, position + 1]]
        for row in range(2)
        for position in range(5)
        if labels[row, position + 1] != -100
    ]
    assert outputs.loss.item() == pytest.approx(np.mean(losses), abs=1e-5)
    total = model(**inputs, labels=labels, num_items_in_batch=7).loss
    assert total.item() == pytest.approx(np.sum(losses) / 7, abs=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_classifier_reads_the_last_valid_state(mask):
    model, inputs = build(RNNForSequenceClassification, num_labels=3), batch(mask)
    outputs = model(**inputs, labels=torch.tensor([2, 0]))
    logits = []
    for ids, valid in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        logits.append(model.classifier(model.model(ids[valid][None]).last_hidden_state[0, -1]))
    torch.testing.assert_close(outputs.logits, torch.stack(logits), atol=1e-5, rtol=0)
    scores = outputs.logits.detach().double().numpy()
    losses = np.log(np.exp(scores).sum(1)) - scores[[0, 1], [2, 0]]
    assert outputs.loss.item() == pytest.approx(losses.mean(), abs=1e-5)
    if mask == "none":
        torch.testing.assert_close(model(inputs["input_ids"]).logits, outputs.logits, atol=1e-6, rtol=0)


def test_options_of_the_forward():
    model, inputs = build(RNNForCausalLM), batch("left")
    full = model(**inputs, output_hidden_states=True)
    assert len(full.hidden_states) == 4
    assert model(**inputs).hidden_states is None
    last = model(
        **inputs, logits_to_keep=2
    ).logits  # a product of fewer rows, which some processors round in another way
    torch.testing.assert_close(last, full.logits[:, -2:], atol=1e-6, rtol=0)
    assert isinstance(model(**inputs, return_dict=False), tuple)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embedded = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert torch.equal(embedded.logits, full.logits)
    assert CACHE in model(**inputs)
    assert CACHE not in model.train()(**inputs)


def test_dropout_is_between_layers_only():
    one, three = (build(RNNModel, dropout=0.9, num_hidden_layers=layers) for layers in (1, 3))
    for model, same in ((one, True), (three, False)):
        states = [model.train(mode)(**batch(), output_hidden_states=True).hidden_states for mode in (True, False)]
        assert torch.equal(states[0][1], states[1][1])
        assert torch.equal(states[0][-1], states[1][-1]) is same


@every_cell
def test_initial_weights_are_torchs_for_the_recurrence_and_normal_elsewhere(cell):
    model = build(RNNForCausalLM, cell, hidden_size=64, embedding_size=64, vocab_size=500, initializer_range=0.3)
    for layer in model.model.layers:
        for parameter in layer.parameters():
            assert parameter.abs().max() <= 1 / 8
            assert parameter.std().item() == pytest.approx(1 / 8 / np.sqrt(3), rel=0.2)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert model.lm_head.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert not model.lm_head.bias.any()


@every_cell
def test_weights_missing_from_a_checkpoint_start_as_in_torch(cell, tmp_path):
    build(RNNModel, cell, num_hidden_layers=1).save_pretrained(tmp_path)
    deeper = RNNModel.from_pretrained(tmp_path, num_hidden_layers=2)  # built on the meta device
    bound = 8**-0.5
    for parameter in deeper.layers[1].parameters():
        assert 0 < parameter.abs().max() <= bound
    _, first, second = deeper(**batch(), output_hidden_states=True).hidden_states
    expected = numpy_layer(deeper.layers[1], first[0].detach().double().numpy())
    np.testing.assert_allclose(second[0].detach().numpy(), expected, atol=1e-5)


def test_tied_embeddings_stay_tied_after_loading(tmp_path):
    build(RNNForCausalLM, embedding_size=None, tie_word_embeddings=True).save_pretrained(tmp_path)
    model = RNNForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.embedding_size == 8


def has_bfloat16_lstm():
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nn.LSTM(4, 4, batch_first=True)(torch.randn(2, 3, 4))
    except RuntimeError:
        return False
    return True


@every_cell
def test_bfloat16_autocast_trains_and_generates(cell):
    if cell == "lstm" and not has_bfloat16_lstm():
        pytest.skip("this CPU cannot run torch's LSTM in bfloat16")
    model, inputs = build(RNNForCausalLM, cell), batch("left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        generated = model.eval().generate(**inputs, max_new_tokens=3)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert generated.shape == (2, 9)


def test_a_forward_needs_one_kind_of_input():
    model = build(RNNModel)
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds, got neither"):
        model()
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds, got both"):
        model(batch()["input_ids"], inputs_embeds=torch.zeros(2, 6, 6))
