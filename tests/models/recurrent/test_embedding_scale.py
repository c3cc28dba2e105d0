"""Embeddings and tied output apart: what is read and written, older configs, and other projects' tables."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model

import hf_lnlm
from hf_lnlm.convert.recurrent import to_word_language_model, word_language_model
from hf_lnlm.convert.word_vectors import load_word_vectors
from hf_lnlm.models.recurrent.configuration_rnn import RNNConfig
from hf_lnlm.models.recurrent.modeling_rnn import RNNForCausalLM, RNNForSequenceClassification
from tests.contract.cases import add_noise, token_ids

FIELDS = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1}


def make(**fields) -> RNNForCausalLM:
    torch.manual_seed(0)
    return RNNForCausalLM(RNNConfig(**FIELDS, **fields)).eval()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_first_layer_reads_the_table_times_the_root_of_its_width(cell):
    model = make(cell_type=cell)
    table = model.model.embed_tokens
    scale = {"lstm": 4.0, "gru": 8.0}[cell]
    assert model.config.input_scale == table.embed_scale == scale
    assert float(table.weight.detach().std()) == pytest.approx(1 / scale, rel=0.1)
    ids = token_ids(2, 5)
    assert torch.equal(table(ids), table.weight[ids] * scale)
    assert torch.equal(model(inputs_embeds=table(ids)).logits, model(ids).logits)
    assert torch.equal(model(ids).logits, model.model(ids).last_hidden_state @ table.weight.T)
    model = make(project_output=True)
    hidden = model.output_projection(model.model(ids).last_hidden_state)
    assert torch.equal(model(ids).logits, hidden @ model.model.embed_tokens.weight.T)


def test_saved_before_there_was_the_field_means_the_old_model(tmp_path):
    old = {k: v for k, v in RNNConfig(**FIELDS).to_dict().items() if k not in ("embedding_scale", "project_output")}
    config = RNNConfig.from_dict(old)
    assert (config.embedding_scale, config.project_output) == (1.0, False)
    model = RNNForCausalLM(config)
    assert model.output_projection is None
    assert float(model.model.embed_tokens.weight.detach().std()) == pytest.approx(1.0, rel=0.1)
    assert torch.equal(model.model.embed_tokens(token_ids(1, 4)), model.model.embed_tokens.weight[token_ids(1, 4)])
    whole = hf_lnlm.SentencePairConfig(encoder={**old, "model_type": "lnlm_rnn", "bidirectional": True}).to_dict()
    assert whole["encoder"]["embedding_scale"] is None  # made here, not read
    for name in ("embedding_scale", "project_output"):
        del whole["encoder"][name]
    assert hf_lnlm.SentencePairConfig.from_dict(whole).encoder.embedding_scale == 1.0
    RNNConfig(**FIELDS).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["embedding_scale"] is None
    assert RNNConfig.from_pretrained(tmp_path).input_scale == 4.0


def test_a_projection_of_outputs_belongs_to_one_of_embeddings():
    assert make().output_projection is None and make(project_output=True).output_projection is not None
    assert make(tie_word_embeddings=False, project_output=True).output_projection is None
    with pytest.raises(ValueError, match="project_output needs project_embeddings"):
        RNNConfig(**FIELDS, project_embeddings=False, project_output=True)
    with pytest.raises(ValueError, match=r"embedding_scale must be between 0.001 and 1000000.0, got 0"):
        RNNConfig(**FIELDS, embedding_scale=0)


def test_resizing_keeps_the_scale():
    model = make()
    model.resize_token_embeddings(70)
    ids = token_ids(1, 4)
    assert torch.equal(model.model.embed_tokens(ids), model.model.embed_tokens.weight[ids] * 4)


def test_adapted_embeddings_are_scaled_too():
    model = add_noise(make(tie_word_embeddings=False), 1)
    adapted = get_peft_model(model, hf_lnlm.lora_config(model, 4, embeddings=True))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    ids = token_ids(2, 6)
    wanted = adapted(ids).logits
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_word_vectors_are_read_as_they_are():
    model = RNNForSequenceClassification(RNNConfig(**FIELDS))
    vector = torch.linspace(-1, 1, 16)
    assert load_word_vectors(model, {"a": 7, "b": 8}, {"a": vector.numpy()}) == ["a"]
    torch.testing.assert_close(model.model.embed_tokens(torch.tensor([7]))[0], vector)


def test_other_projects_get_the_embeddings_that_the_layers_read():
    model = add_noise(make(tie_word_embeddings=False, project_embeddings=False), 1)
    state = to_word_language_model(model.state_dict(), model.config.input_scale)
    again = word_language_model(state, {})
    assert again.config.input_scale == 1.0
    ids = token_ids(2, 6)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
