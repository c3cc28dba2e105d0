"""The recurrent family beyond the contract: directions, packing, AWD's regularisers, loss heads, states, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache

from hf_lnlm.models.recurrent.configuration_rnn import RNNConfig
from hf_lnlm.models.recurrent.modeling_rnn import (
    RNNForCausalLM,
    RNNForSequenceClassification,
    RNNForTokenClassification,
    RNNModel,
)
from tests.contract.cases import add_noise, token_ids

CELLS = ("lstm", "gru")
TIGHT = {"rtol": 1e-9, "atol": 1e-11}
OF_LOGITS = {"rtol": 1e-6, "atol": 1e-7, "check_dtype": False}  # transformers' loss takes logits in float32


def config(**fields) -> RNNConfig:
    return RNNConfig(
        **({"vocab_size": 61, "hidden_size": 6, "num_hidden_layers": 2, "tie_word_embeddings": False} | fields)
    )


def make(cls=RNNForCausalLM, seed: int = 1, **fields):
    torch.manual_seed(seed)
    return add_noise(cls(config(**fields)), seed).double().eval()


def of_torch(model: RNNModel) -> nn.Module:
    """torch's own module with the model's weights."""
    kind = {"lstm": nn.LSTM, "gru": nn.GRU}[model.config.cell_type]
    inputs, hidden = model.config.layer_sizes(0)
    layers, both = model.config.num_hidden_layers, model.config.bidirectional
    module = kind(inputs, hidden, layers, batch_first=True, bidirectional=both).double()
    for number, layer in enumerate(model.layers):
        for suffix, direction in (("", layer.forwards), ("_reverse", layer.backwards)):
            if direction is None:
                continue
            values = (direction.input_gates.weight, direction.recurrent_gates.weight)
            biases = (direction.input_gates.bias, direction.recurrent_gates.bias)
            names = [f"{name}_l{number}{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            for name, value in zip(names, (*values, *biases), strict=True):
                getattr(module, name).data.copy_(value)
    return module


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("both", [False, True], ids=["one way", "both ways"])
def test_equals_the_module_of_torch(cell, both):
    model = make(RNNModel, cell_type=cell, bidirectional=both)
    ids = token_ids(3, 7)
    wanted, final = of_torch(model)(model.embed_tokens(ids))
    outputs = model(ids, use_cache=not both)
    torch.testing.assert_close(outputs.last_hidden_state, wanted, **TIGHT)
    if not both:
        states = final if cell == "lstm" else (final,)
        for number, layer in enumerate(outputs.past_key_values.layers):
            for name, state in zip(("h", "c"), states, strict=False):
                torch.testing.assert_close(layer.states[name], state[number], **TIGHT)


@st.composite
def batches(draw):
    """Masks and documents of a batch; document numbers and positions say the same."""
    batch, length = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    cells = st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)
    mask = torch.tensor(draw(cells)).view(batch, length)
    if draw(st.booleans()):
        mask[:] = True
    starts = torch.tensor(draw(cells)).view(batch, length) & torch.tensor(draw(cells)).view(batch, length)
    return mask, starts & mask, draw(st.sampled_from(["position_ids", "seq_idx"]))


def alone(model: RNNModel, ids: torch.Tensor, mask: torch.Tensor, starts: torch.Tensor) -> list:
    """The definition: every document of one row by itself, with the cells of its tokens."""
    found, cells = [], []
    for column in range(ids.shape[0]):
        if mask[column]:
            if starts[column] and cells:
                found.append(cells)
                cells = []
            cells.append(column)
    found += [cells] if cells else []
    return [(cells, model(ids[cells][None], use_cache=not model.config.bidirectional)) for cells in found]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("both", [False, True], ids=["one way", "both ways"])
@settings(max_examples=60)
@given(pattern=batches())
def test_any_padding_and_packing_equals_each_document_alone(cell, both, pattern):
    mask, starts, marker = pattern
    model = make(RNNModel, cell_type=cell, bidirectional=both)
    ids = token_ids(*mask.shape)
    positions = torch.where(starts, 0, 1)
    given_marker = positions if marker == "position_ids" else starts.cumsum(1)
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask.long(), use_cache=not both, **{marker: given_marker})
        for row in range(mask.shape[0]):
            documents = alone(model, ids[row], mask[row], starts[row])
            for cells, wanted in documents:
                torch.testing.assert_close(outputs.last_hidden_state[row, cells], wanted.last_hidden_state[0], **TIGHT)
            if not both and documents:
                for layer, last in zip(
                    outputs.past_key_values.layers, documents[-1][1].past_key_values.layers, strict=True
                ):
                    for name, state in layer.states.items():
                        torch.testing.assert_close(state[row], last.states[name][0], **TIGHT)
    assert not outputs.last_hidden_state[~mask].any()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_gradients_of_a_ragged_batch_are_those_of_its_rows(cell, backend):
    model = make(cell_type=cell, backend=backend)
    ids, mask = token_ids(4, 9), torch.ones(4, 9, dtype=torch.long)
    mask[0, :3] = mask[1, 6:] = mask[2, [0, 4, 5]] = 0
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    weights = torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(4)).double()
    leaves = list(model.model.parameters())
    found = torch.autograd.grad((hidden * weights).sum(), leaves)
    loss = 0.0
    for row in range(4):
        real = mask[row].bool()
        loss = loss + (model.model(ids[row, real][None]).last_hidden_state[0] * weights[row, real]).sum()
    for a, b in zip(found, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_flow_through_the_carried_state_until_it_is_detached(cell):
    model = make(cell_type=cell)
    ids = token_ids(2, 8)
    leaves = list(model.model.parameters())
    whole = model.model(ids, use_cache=True).last_hidden_state[:, 4:].square().sum()
    first = model.model(ids[:, :4], use_cache=True)
    second = model.model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    for a, b in zip(
        torch.autograd.grad(second.last_hidden_state.square().sum(), leaves),
        torch.autograd.grad(whole, leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **TIGHT)
    cache = model.model(ids[:, :4], use_cache=True).past_key_values
    for layer in cache.layers:
        layer.detach_()
    cut = model.model(ids[:, 4:], past_key_values=cache).last_hidden_state
    torch.testing.assert_close(cut, second.last_hidden_state, **TIGHT)
    assert torch.autograd.grad(cut.sum(), model.model.embed_tokens.weight)[0][ids[0, 0]].abs().sum() == 0 or (
        ids[0, 0] in ids[:, 4:]
    )


def test_document_at_the_start_of_a_segment_forgets_the_carried_state():
    model = make(RNNModel)
    ids = token_ids(2, 6)
    cache = model(token_ids(2, 5, seed=9), use_cache=True).past_key_values
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        found = model(ids, past_key_values=cache, position_ids=positions).last_hidden_state
        fresh = model(ids).last_hidden_state
    torch.testing.assert_close(found[0], fresh[0], **TIGHT)
    assert not torch.allclose(found[1], fresh[1])


REGULARISERS = {
    "embedding_dropout": 0.2,
    "input_dropout": 0.2,
    "hidden_dropout": 0.2,
    "output_dropout": 0.2,
    "weight_dropout": 0.3,
    "activation_penalty": 2.0,
    "temporal_penalty": 1.0,
}


@pytest.mark.parametrize("cell", CELLS)
def test_rates_of_zero_are_the_plain_model(cell):
    ids = token_ids(2, 7)
    plain = make(cell_type=cell).train()
    zero = make(cell_type=cell, **dict.fromkeys(REGULARISERS, 0.0)).train()
    a, b = plain(ids, labels=ids), zero(ids, labels=ids)
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(a.logits, b.logits)


def test_evaluation_is_deterministic_and_plain():
    ids = token_ids(2, 7)
    model, plain = make(**REGULARISERS), make()
    with torch.no_grad():
        first, second, wanted = (m(ids, labels=ids) for m in (model, model, plain))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.logits, wanted.logits)
    assert torch.equal(first.loss, wanted.loss)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_regularisers_do_not_change_the_state_dict():
    assert list(make(**REGULARISERS).state_dict()) == list(make().state_dict())


@pytest.mark.parametrize("cell", CELLS)
def test_dropped_weights_get_no_gradient(cell, monkeypatch):
    model = make(RNNModel, cell_type=cell, num_hidden_layers=1, weight_dropout=0.5).train()
    masks = []

    def recorded(weight: torch.Tensor, p: float) -> torch.Tensor:
        masks.append(torch.rand(weight.shape) < 0.5)
        return weight * masks[-1] / (1 - p)

    monkeypatch.setattr("hf_lnlm.models.recurrent.layers.dropout", recorded)
    model(token_ids(2, 7)).last_hidden_state.sum().backward()
    gradient = model.layers[0].forwards.recurrent_gates.weight.grad
    assert len(masks) == 1, "one mask a forward pass, for all time steps"
    assert not gradient[~masks[0]].any()
    assert gradient[masks[0]].any()
    assert model.layers[0].forwards.input_gates.weight.grad.any()


def test_penalties_in_closed_form():
    # AR = alpha · mean(dropped output²), TAR = beta · mean((raw_{t+1} - raw_t)²), over positions with a label;
    # nothing is dropped here, so dropped output = raw output = last hidden state.
    model, plain = make(activation_penalty=3.0, temporal_penalty=5.0).train(), make().train()
    ids = token_ids(2, 6)
    labels = ids.clone()
    labels[0, 3] = -100  # the position before it has no target
    hidden = plain.model(ids).last_hidden_state
    targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    labelled = (targets != -100)[..., None]
    count, width = labelled.sum(), hidden.shape[-1]
    activation = (hidden.square() * labelled).sum() / (count * width)
    change = ((hidden[:, 1:] - hidden[:, :-1]).square() * labelled[:, :-1]).sum() / (count * width)
    wanted = plain(ids, labels=labels).loss + 3.0 * activation + 5.0 * change
    torch.testing.assert_close(model(ids, labels=labels).loss, wanted, **OF_LOGITS)


def test_penalties_add_up_over_accumulated_batches():
    model = make(activation_penalty=3.0, temporal_penalty=5.0).train()
    ids = token_ids(4, 6)
    labels = ids.clone()
    labels[0, 2:] = -100
    items = (labels[:, 1:] != -100).sum()
    parts = [model(ids[s], labels=labels[s], num_items_in_batch=items).loss for s in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), model(ids, labels=labels).loss, **OF_LOGITS)


def test_chunked_head_is_the_full_one():
    ids = token_ids(3, 9)
    labels = ids.clone()
    labels[1, 4:] = -100
    for tied in (False, True):
        full = make(tie_word_embeddings=tied).train()
        chunked = make(tie_word_embeddings=tied, loss_head="chunked", loss_chunk_size=5, loss_dtype="float32").train()
        assert list(full.state_dict()) == list(chunked.state_dict())
        one, two = full(ids, labels=labels), chunked(ids, labels=labels)
        assert two.logits is None
        torch.testing.assert_close(two.loss, one.loss, **OF_LOGITS)
        one.loss.backward()
        two.loss.backward()
        for a, b in zip(full.parameters(), chunked.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(chunked.eval()(ids, labels=labels).loss, full.eval()(ids, labels=labels).loss)
        assert chunked(ids).logits.shape == (3, 9, 61)


def test_adaptive_head_gives_log_probabilities_and_its_loss():
    model = make(loss_head="adaptive", adaptive_cutoffs=[10, 30], adaptive_div_value=2)
    ids = token_ids(3, 9)
    outputs = model(ids, labels=ids)
    torch.testing.assert_close(outputs.logits.exp().sum(-1), torch.ones(3, 9).double())
    training = model.train()(ids, labels=ids)
    assert training.logits is None
    torch.testing.assert_close(training.loss, outputs.loss, **OF_LOGITS)
    with pytest.raises(ValueError, match="adaptive softmax cannot be resized from 61 to 70"):
        model.resize_token_embeddings(70)
    assert model.resize_token_embeddings(61) is not None


@pytest.mark.parametrize("head", ["full", "chunked", "adaptive"])
def test_all_labels_ignored(head):
    cutoffs = {"adaptive_cutoffs": [10, 30], "adaptive_div_value": 1.5} if head == "adaptive" else {}
    model = make(loss_head=head, **cutoffs).train()
    ids = token_ids(2, 5)
    loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=4).loss
    assert loss.item() == 0
    loss.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
@pytest.mark.parametrize("both", [False, True], ids=["one way", "both ways"])
def test_pooling_sees_real_tokens_only(pooling, both):
    model = make(RNNForSequenceClassification, pooling=pooling, bidirectional=both)
    ids = token_ids(1, 6)
    padded = torch.cat([torch.full((1, 2), 11), ids, torch.full((1, 3), 11)], 1)
    mask = torch.tensor([[0] * 2 + [1] * 6 + [0] * 3])
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, model(ids).logits, **TIGHT)
    nothing = model(ids, attention_mask=torch.zeros_like(ids)).logits
    torch.testing.assert_close(nothing[0], model.classifier.bias, **TIGHT)


def test_last_pooling_takes_the_last_token_forwards_and_the_first_backwards():
    model = make(RNNForSequenceClassification, pooling="last", bidirectional=True)
    ids = token_ids(2, 6)
    hidden = model.model(ids).last_hidden_state
    wanted = model.classifier(torch.cat([hidden[:, -1, :6], hidden[:, 0, 6:]], -1))
    torch.testing.assert_close(model(ids).logits, wanted, **TIGHT)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cell_type": "rnn"}, "cell_type must be one of lstm, gru, got 'rnn'"),
        ({"weight_dropout": 1.0}, "weight_dropout"),
        ({"hidden_dropout": -0.1}, "hidden_dropout"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"pad_token_id": 61}, "pad_token_id"),
        ({"eos_token_id": [1, 61]}, "eos_token_id"),
        ({"loss_head": "adaptive"}, "adaptive_cutoffs"),
        ({"loss_head": "adaptive", "adaptive_cutoffs": [10, 61]}, r"adaptive_cutoffs .*61"),
        ({"loss_head": "adaptive", "adaptive_cutoffs": [10, 10]}, "adaptive_cutoffs"),
        ({"loss_head": "adaptive", "adaptive_cutoffs": [9, 20]}, "adaptive_div_value .*got 4"),
        ({"loss_head": "adaptive", "adaptive_cutoffs": [9], "tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"embedding_size": 4, "project_embeddings": False, "tie_word_embeddings": True}, "embedding_size"),
        ({"hidden_size": "six"}, "hidden_size"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        config(**fields)


def test_a_causal_model_cannot_be_bidirectional():
    with pytest.raises(ValueError, match=r"bidirectional must be False, got True"):
        RNNForCausalLM(config(bidirectional=True))
    for cls in (RNNForSequenceClassification, RNNForTokenClassification, RNNModel):
        assert cls(config(bidirectional=True))


def test_inputs_that_do_not_fit_are_refused():
    model = make(RNNModel)
    ids = token_ids(2, 5)
    with pytest.raises(ValueError, match="neither"):
        model()
    with pytest.raises(ValueError, match="both"):
        model(ids, inputs_embeds=model.embed_tokens(ids))
    with pytest.raises(ValueError, match="no positions"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="input_ids must be between 0"):
        model(ids + 100)


def test_states_that_do_not_fit_are_refused():
    model = make(RNNModel)
    ids = token_ids(2, 5)
    others = {
        "the states of 2 layers": DynamicCache(),
        "'gru' layer": make(RNNModel, cell_type="gru")(ids, use_cache=True).past_key_values,
        r"shape \(5,\) a row": make(RNNModel, hidden_size=5)(ids, use_cache=True).past_key_values,
        "the states of 2 layers, as": make(RNNModel, num_hidden_layers=3)(ids, use_cache=True).past_key_values,
        "3 rows": model(token_ids(3, 5), use_cache=True).past_key_values,
    }
    for said, cache in others.items():
        with pytest.raises(ValueError, match=said):
            model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="reads both ways"):
        make(RNNModel, bidirectional=True)(ids, past_key_values=model(ids, use_cache=True).past_key_values)


def test_initialisation():
    torch.manual_seed(0)
    model = RNNForCausalLM(
        config(hidden_size=64, embedding_size=16, tie_word_embeddings=True, pad_token_id=3, forget_bias=1.5)
    )
    direction = model.model.layers[0].forwards
    for gate in direction.recurrent_gates.weight.chunk(4):
        torch.testing.assert_close(gate @ gate.mT, torch.eye(64), rtol=0, atol=1e-5)
    for gate in direction.input_gates.weight.chunk(4):
        bound = (6 / (gate.shape[0] + gate.shape[1])) ** 0.5
        assert 0.95 * bound < gate.abs().max() <= bound
    assert direction.input_gates.bias[64:128].unique().tolist() == [1.5]
    assert not direction.input_gates.bias[:64].any()
    assert not direction.recurrent_gates.bias.any()
    embeddings = model.model.embed_tokens.weight
    assert embeddings.detach().std().item() == pytest.approx(1.0 / 4, rel=0.1)  # the layers read 4 times that
    assert not embeddings[3].any()


def test_loaded_weights_are_not_initialised_again(tmp_path):
    model = make()
    model.model.embed_tokens.weight.data[0] = 7.0
    model.save_pretrained(tmp_path)
    other = RNNForTokenClassification.from_pretrained(tmp_path, dtype=torch.float64)
    for name, value in model.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value), name


def test_layer_sizes_of_the_paper():
    # AWD-LSTM on PTB: 400 → 1150 → 1150 → 400, embeddings tied to the softmax without a projection: 24.2 million.
    awd = RNNConfig(
        vocab_size=10_000,
        embedding_size=400,
        hidden_size=1150,
        last_hidden_size=400,
        num_hidden_layers=3,
        project_embeddings=False,
    )
    assert [awd.layer_sizes(layer) for layer in range(3)] == [(400, 1150), (1150, 1150), (1150, 400)]
    with torch.device("meta"):
        model = RNNForCausalLM(awd)
    # 4e6 + (400 + 1150 + 2)·4600 + (1150 + 1150 + 2)·4600 + (1150 + 400 + 2)·1600 = 24,211,600, no bias of the softmax
    assert sum(p.numel() for p in model.parameters()) == 4_000_000 + 7_139_200 + 10_589_200 + 2_483_200
