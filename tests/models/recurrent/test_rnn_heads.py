"""The recurrent heads that read whole texts: masked language model and extractive reader."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_lnlm.models.recurrent import modeling_rnn
from hf_lnlm.models.recurrent.configuration_rnn import RNNConfig
from hf_lnlm.models.recurrent.modeling_rnn import RNNForCausalLM, RNNForMaskedLM, RNNForQuestionAnswering
from tests.contract.cases import add_noise, token_ids


def make(cls, **fields):
    torch.manual_seed(1)
    given = {"vocab_size": 61, "hidden_size": 6, "num_hidden_layers": 2, "tie_word_embeddings": False} | fields
    return add_noise(cls(RNNConfig(**given)), 1).double().eval()


def masked_labels(ids):
    return torch.where(torch.arange(ids.shape[1]) % 3 == 1, ids, -100)


def test_masked_model_reads_both_ways_unless_told_otherwise(monkeypatch):
    assert make(RNNForMaskedLM).config.bidirectional is True
    said = []
    monkeypatch.setattr(modeling_rnn.logger, "warning", said.append)
    assert RNNForMaskedLM(RNNConfig(bidirectional=False)).model.layers[0].backwards is None
    assert said == ["RNNForMaskedLM with bidirectional=False does not see what follows a mask"]
    with pytest.raises(ValueError, match="cannot be bidirectional"):
        RNNForCausalLM(make(RNNForMaskedLM).config)


@pytest.mark.parametrize("tied", [False, True])
def test_masked_loss_is_the_mean_over_labelled_positions(tied):
    model = make(RNNForMaskedLM, tie_word_embeddings=tied)
    ids = token_ids(3, 9)
    labels = masked_labels(ids)
    outputs = model(ids, labels=labels)
    wanted = cross_entropy(outputs.logits.float().flatten(0, 1), labels.flatten())
    torch.testing.assert_close(outputs.loss, wanted, rtol=1e-6, atol=1e-7, check_dtype=False)
    whole = model(ids, labels=labels, num_items_in_batch=2 * (labels != -100).sum()).loss
    torch.testing.assert_close(whole, outputs.loss / 2, rtol=1e-6, atol=1e-7)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_every_position_sees_both_sides():
    model = make(RNNForMaskedLM)
    ids = token_ids(1, 9)
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[0, 4].logsumexp(-1).backward()
    seen = embeds.grad[0].abs().sum(-1)
    assert bool((seen > 0).all())


@pytest.mark.parametrize(
    "fields",
    [
        {"loss_head": "chunked", "loss_chunk_size": 4},
        {"loss_head": "adaptive", "adaptive_cutoffs": [10, 30], "adaptive_div_value": 1.5},
    ],
    ids=["chunked", "adaptive"],
)
def test_heads_without_logits_give_the_same_loss(fields):
    model = make(RNNForMaskedLM, **fields).train()
    ids = token_ids(3, 9)
    labels = masked_labels(ids)
    training = model(ids, labels=labels)
    evaluation = model.eval()(ids, labels=labels)
    assert training.logits is None
    assert evaluation.logits.shape == (3, 9, 61)
    torch.testing.assert_close(training.loss, evaluation.loss, rtol=1e-6, atol=1e-7, check_dtype=False)


def test_reader_marks_first_and_last_token():
    model = make(RNNForQuestionAnswering, bidirectional=True)
    ids = token_ids(3, 9)
    start, end = torch.tensor([1, 4, 0]), torch.tensor([2, 8, 11])  # 11 lies beyond the text: ignored
    outputs = model(ids, start_positions=start, end_positions=end)
    first = cross_entropy(outputs.start_logits, start)
    last = cross_entropy(outputs.end_logits[:2], end[:2])
    torch.testing.assert_close(outputs.loss, (first + last) / 2)
    assert outputs.start_logits.shape == outputs.end_logits.shape == (3, 9)
