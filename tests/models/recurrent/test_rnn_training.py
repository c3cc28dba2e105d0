"""What training and serving do to the recurrent family: checkpointing, tracing, patched modules, narrow types."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from hf_lnlm.models.recurrent.configuration_rnn import RNNConfig
from hf_lnlm.models.recurrent.modeling_rnn import RNNForCausalLM, RNNModel
from hf_lnlm.ops.linear_cross_entropy import linear_cross_entropy

CELLS = ("lstm", "gru")


def config(**fields) -> RNNConfig:
    common = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2, "tie_word_embeddings": False}
    return RNNConfig(**(common | fields))


def gradients_over_two_segments(model: RNNForCausalLM, ids: torch.Tensor, mask: torch.Tensor | None) -> dict:
    """Gradients of the second segment's loss, through the state that the first one left."""
    model.zero_grad()
    cache = DynamicCache(config=model.config)
    model(ids[:, :4], attention_mask=None if mask is None else mask[:, :4], past_key_values=cache)
    model(ids[:, 4:], attention_mask=mask, past_key_values=cache, labels=ids[:, 4:]).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "ragged"])
def test_checkpointing_keeps_the_gradients_of_a_carried_state(cell, reentrant, masked):
    model = RNNForCausalLM(config(cell_type=cell)).train()
    ids, mask = torch.randint(1, 50, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, :3], mask[1, 4], mask[2, 7:] = 0, 0, 0
    wanted = gradients_over_two_segments(model, ids, mask if masked else None)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients_over_two_segments(model, ids, mask if masked else None)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cell", CELLS)
def test_fused_kernels_run_in_training_mode_while_gradients_are_wanted(cell, monkeypatch):
    # On a GPU cuDNN refuses the backward pass otherwise; here one can only see what it is told.
    model, asked, kernel = RNNModel(config(cell_type=cell)), [], getattr(torch, cell)

    def recorded(*arguments):
        asked.append(arguments[6])
        return kernel(*arguments)

    monkeypatch.setattr(torch, cell, recorded)
    model(torch.randint(1, 50, (2, 5)))
    with torch.no_grad():
        model(torch.randint(1, 50, (2, 5)))
    assert asked == [True, True, False, False]


def test_a_document_that_begins_under_the_mask_begins_at_its_first_real_token():
    model = RNNModel(config()).eval()
    ids, mask = torch.randint(1, 50, (1, 7)), torch.tensor([[1, 1, 0, 0, 1, 1, 1]])
    packed = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    found = model(ids, attention_mask=mask, seq_idx=packed).last_hidden_state
    torch.testing.assert_close(found[:, 4:], model(ids[:, 4:]).last_hidden_state)
    torch.testing.assert_close(found[:, :2], model(ids[:, :2]).last_hidden_state)


def test_masked_tokens_of_another_number_begin_no_document():
    model = RNNModel(config()).eval()
    ids, mask = torch.randint(1, 50, (1, 5)), torch.tensor([[1, 1, 0, 1, 1]])
    found = model(ids, attention_mask=mask, seq_idx=torch.tensor([[3, 3, 9, 3, 3]])).last_hidden_state
    whole = model(ids[:, [0, 1, 3, 4]]).last_hidden_state
    torch.testing.assert_close(found[:, [0, 1, 3, 4]], whole)


@pytest.mark.parametrize("cell", CELLS)
def test_a_forward_put_on_a_gate_is_obeyed(cell):
    model = RNNModel(config(cell_type=cell, num_hidden_layers=1)).eval()
    direction, ids = model.layers[0].forwards, torch.randint(1, 50, (2, 6))
    plain = direction.input_gates.forward
    direction.input_gates.forward = lambda inputs: 2.0 * plain(inputs)
    found = model(ids).last_hidden_state
    del direction.input_gates.forward
    with torch.no_grad():
        direction.input_gates.weight.mul_(2.0)
        direction.input_gates.bias.mul_(2.0)
    torch.testing.assert_close(found, model(ids).last_hidden_state)


def test_chunked_gradients_in_bfloat16_are_scaled_without_rounding_the_scale():
    # 1/3 in bfloat16 is 0.2 % too large: every gradient would be, alike.
    weight = torch.randn(7, 4, dtype=torch.bfloat16, requires_grad=True)
    hidden, labels = torch.randn(5, 4, dtype=torch.bfloat16), torch.randint(0, 7, (5,))
    loss = linear_cross_entropy(hidden, weight, None, labels, 5, torch.bfloat16)
    (whole,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (third,) = torch.autograd.grad(loss / 3, weight)
    assert torch.equal(third, (whole.float() / 3).bfloat16())


def test_backends_that_do_not_exist_are_refused():
    arguments = (torch.randn(3, 4), torch.randn(5, 4), None, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="reference, eager, got 'gpu'"):
        linear_cross_entropy(*arguments, backend="gpu")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"loss_head": "adaptive", "adaptive_cutoffs": [*range(1, 49)], "adaptive_div_value": 1e6}, "no width"),
        ({"num_labels": 2.5}, "num_labels must be a whole number between 1 and .*, got 2.5"),
        ({"num_labels": True}, "num_labels must be a whole number"),
    ],
    ids=str,
)
def test_fields_that_overflow_or_are_no_number_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        config(**fields)


@pytest.mark.parametrize("cell", CELLS)
def test_the_traced_loop_resets_where_documents_begin_under_the_mask(cell):
    model = RNNModel(config(cell_type=cell, bidirectional=True)).eval()
    ids, mask = torch.randint(1, 50, (2, 7)), torch.tensor([[1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 1, 0]])
    packed = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 2, 2]])
    wanted = model(ids, attention_mask=mask, seq_idx=packed).last_hidden_state
    found = torch.compile(model, backend="eager")(ids, attention_mask=mask, seq_idx=packed).last_hidden_state
    torch._dynamo.reset()
    kept = mask.unsqueeze(-1)
    torch.testing.assert_close(found * kept, wanted * kept)
