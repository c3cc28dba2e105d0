"""EncoderCNN by hand: the modes, the maximum, problem types, adapters, pass-through to the encoder, bad input."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AlbertConfig, BartConfig, BertConfig, BertForMaskedLM, BertModel, GPT2Config, T5Config
from transformers.modeling_outputs import BaseModelOutput

import hf_lnlm
from hf_lnlm.convert import stock_attention as stock
from hf_lnlm.flows.adapters import add_adapter
from hf_lnlm.flows.encoder_head import load_wrapped
from hf_lnlm.flows.recipe import LoraSection, ModelSection
from hf_lnlm.models.hybrid.configuration_encoder_cnn import EncoderCNNConfig
from hf_lnlm.models.hybrid.modeling_encoder_cnn import (
    EncoderCNNForMaskedLM,
    EncoderCNNForSequenceClassification,
    EncoderCNNForTokenClassification,
    EncoderCNNModel,
)
from hf_lnlm.objectives.families import direction_of
from hf_lnlm.objectives.replaced_token import narrowed
from hf_lnlm.registry import family
from tests.contract.cases import add_noise, token_ids

from .encoders import MODES, classifier_on, encoder_of, tagger_on

every_mode = pytest.mark.parametrize("mode", MODES)


def windows_by_hand(model, frames):
    """Maxima over all windows inside `(length, width)` frames, window size by window size, in float64."""
    found = []
    for window in model.model.window_head.windows:
        size = window.kernel_size
        taps = window.projection.weight.double().view(window.out_features, window.in_features, size)
        padded = F.pad(frames.double(), (0, 0, 0, max(size - len(frames), 0)))
        values = [
            torch.einsum("fck,kc->f", taps, padded[i : i + size]) + window.projection.bias.double()
            for i in range(len(padded) - size + 1)
        ]
        found.append(torch.stack(values).amax(0))
    return torch.cat(found).relu()


def frames_by_hand(model, mode, states):
    """What the windows slide over, from the layers' states of one text."""
    if mode == "last":
        return states[-1]
    if mode == "last_n":
        return torch.cat(states[-2:], dim=-1)
    if mode == "all_cls":
        return torch.stack([layer[0] for layer in states])
    mix = model.model.layer_mix
    return sum(share * layer for share, layer in zip(mix.weights.softmax(0) * mix.scale, states))


@every_mode
@pytest.mark.parametrize("length", [1, 2, 7])
def test_features_and_scores_by_hand(mode, length):
    model = classifier_on("bert", mode, num_layers=2)
    ids = token_ids(1, length)
    with torch.no_grad():
        outputs = model.model(ids, output_hidden_states=True)
        states = [layer[0] for layer in outputs.hidden_states[1:]]
        features = windows_by_hand(model, frames_by_hand(model, mode, states))
        torch.testing.assert_close(outputs.pooler_output[0].double(), features, rtol=1e-5, atol=1e-6)
        scores = F.linear(features.float(), model.classifier.weight, model.classifier.bias)
        torch.testing.assert_close(model(ids).logits[0], scores, rtol=1e-5, atol=1e-6)


def test_last_n_layers_are_channels_of_an_image():
    model = classifier_on("bert", "last_n", num_layers=2, filter_sizes=[3])
    ids = token_ids(2, 8)
    window = model.model.window_head.windows[0]
    image = nn.Conv2d(2, 4, (3, 16))
    with torch.no_grad():
        outputs = model.model(ids, output_hidden_states=True)
        layers = torch.stack(outputs.hidden_states[-2:], dim=1)  # (batch, channels, length, width): as published
        image.weight.copy_(window.projection.weight.view(4, 2, 16, 3).permute(0, 1, 3, 2))
        image.bias.copy_(window.projection.bias)
        torch.testing.assert_close(outputs.pooler_output, image(layers).squeeze(3).relu().amax(2))


def test_a_tag_sees_the_windows_around_its_token():
    model = tagger_on("bert", filter_sizes=[3])
    ids = token_ids(1, 7)
    with torch.no_grad():
        states = model.model.encoder(ids).last_hidden_state[0]
        window = model.model.window_head.windows[0]
        taps = window.projection.weight.view(4, 16, 3)
        padded = F.pad(states, (0, 0, 1, 1))
        for place in range(7):
            value = torch.einsum("fck,kc->f", taps, padded[place : place + 3]) + window.projection.bias
            wanted = F.linear(value.relu(), model.classifier.weight, model.classifier.bias)
            torch.testing.assert_close(model(ids).logits[0, place], wanted, rtol=1e-5, atol=1e-6)


@every_mode
def test_a_row_without_tokens_gives_zero_features_and_finite_gradients(mode):
    model = classifier_on("bert", mode).train()
    ids, mask = token_ids(2, 6), torch.tensor([[1] * 6, [0] * 6])
    pooled = model.model(ids, mask).pooler_output
    if mode != "all_cls":
        assert not pooled[1].any()
    model(ids, mask, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    alone = model.eval()(ids[:1], mask[:1]).logits
    torch.testing.assert_close(model(ids, mask).logits[:1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "labels", "wanted"),
    [
        ({"num_labels": 3}, torch.tensor([2, 0]), lambda x, y: F.cross_entropy(x, y)),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
            lambda x, y: F.binary_cross_entropy_with_logits(x, y),
        ),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0]), lambda x, y: F.mse_loss(x.squeeze(1), y)),
        (
            {"num_labels": 3, "problem_type": "regression"},
            torch.tensor([[1.0, 0.2, -1.0], [0.3, 0.0, 1.0]]),
            lambda x, y: F.mse_loss(x, y),
        ),
    ],
    ids=["single", "multi", "regression", "regression-3"],
)
def test_problem_types(fields, labels, wanted):
    model = classifier_on("bert", **fields)
    outputs = model(token_ids(2, 6), labels=labels)
    torch.testing.assert_close(outputs.loss, wanted(outputs.logits, labels))


@every_mode
def test_lora_on_the_encoder_with_the_head_in_full(mode, tmp_path):
    model = classifier_on("bert", mode)
    adapted = add_adapter(model, LoraSection(enabled=True, r=2), task_type="SEQ_CLS")
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    parts = {"lora_A", "lora_B", "window_head", "classifier"} | ({"layer_mix"} if mode == "scalar_mix" else set())
    assert all(any(part in name for part in parts) for name in trained)
    assert parts == {part for part in parts if any(part in name for name in trained)}
    assert all("encoder" in name for name in trained if "lora_" in name)
    step(adapted)
    ids = token_ids(2, 6)
    scores = adapted.eval()(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = classifier_on("bert", mode)
    with torch.no_grad():
        nn.init.zeros_(fresh.classifier.weight)  # what is trained in full comes from the adapter's folder
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids).logits, scores)
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, scores, rtol=1e-5, atol=1e-5)


def step(model):
    """Two steps, after which every trained weight has moved."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    start = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        model.train()(token_ids(4, 9), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)
    still = [name for name, p in model.named_parameters() if name in start and torch.equal(p, start[name])]
    assert not still, still


def test_the_registry_says_what_is_trained_in_full():
    assert set(family("lnlm_encoder_cnn").lora_trained) == {"window_head", "layer_mix"}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_reaches_the_encoder(implementation, tmp_path):
    model = classifier_on("bert")
    model.save_pretrained(tmp_path)
    again = EncoderCNNForSequenceClassification.from_pretrained(tmp_path, attn_implementation=implementation)
    assert again.model.encoder.config._attn_implementation == implementation
    ids = token_ids(2, 6)
    torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    again.set_attn_implementation("eager")
    assert again.model.encoder.config._attn_implementation == "eager"
    assert len(again(ids, output_attentions=True).attentions) == 3


def test_dtype_reaches_the_encoder(tmp_path):
    model = classifier_on("bert")
    model.save_pretrained(tmp_path)
    half = EncoderCNNForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    ids = token_ids(2, 6)
    torch.testing.assert_close(half(ids).logits.float(), model(ids).logits, rtol=0.1, atol=0.1)
    encoder_of("bert").save_pretrained(tmp_path / "encoder")
    given = EncoderCNNForSequenceClassification.from_encoder_pretrained(
        str(tmp_path / "encoder"), encoder_dtype=torch.bfloat16, num_labels=2
    )
    assert {p.dtype for p in given.parameters()} == {torch.bfloat16}


def test_an_encoder_comes_from_a_folder_a_model_or_a_model_with_a_head(tmp_path):
    source = encoder_of("bert")
    source.save_pretrained(tmp_path)
    ids = token_ids(2, 6)
    with_a_head = BertForMaskedLM(source.config)
    with_a_head.bert.load_state_dict(source.state_dict(), strict=False)
    with torch.no_grad():
        wanted = source(ids).last_hidden_state
        for given in (str(tmp_path), tmp_path, source, with_a_head, classifier_on("bert").model.encoder):
            model = EncoderCNNModel.from_encoder_pretrained(given)
            torch.testing.assert_close(model.encoder(ids).last_hidden_state, wanted)
            assert not model.training


def test_arguments_for_loading_reach_the_encoder_or_are_refused(tmp_path):
    source = encoder_of("bert")
    source.save_pretrained(tmp_path)
    make = EncoderCNNForSequenceClassification.from_encoder_pretrained
    eager = BertModel.from_pretrained(tmp_path, attn_implementation="eager")
    for model in (
        make(tmp_path, encoder_attn_implementation="eager"),
        make(tmp_path, attn_implementation="eager"),
        make(source, attn_implementation="eager"),
        make(eager),
    ):
        assert model.model.encoder.config._attn_implementation == "eager"
    for half in (make(tmp_path, dtype="bfloat16"), make(tmp_path, encoder_dtype=torch.bfloat16)):
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"encoder_revision: only for a checkpoint's name or folder, got .* BertModel"):
        make(source, encoder_revision="main")
    with pytest.raises(ValueError, match="encoder_dtype: only for a checkpoint"):
        make(source, dtype=torch.bfloat16)


def test_a_composed_checkpoint_is_no_encoder_and_takes_its_options_again(tmp_path):
    model, ids = classifier_on("bert", "last_n", num_layers=2), token_ids(2, 6)
    model.save_pretrained(tmp_path)
    for given in (tmp_path, model, model.model):
        with pytest.raises(ValueError, match="got one of lnlm_encoder_cnn: load it by from_pretrained"):
            EncoderCNNForSequenceClassification.from_encoder_pretrained(given)
    same = {"mode": "last_n", "num_layers": 2, "num_filters": 4, "filter_sizes": [1, 2, 3], "num_labels": 3}
    again = EncoderCNNForSequenceClassification.from_pretrained(tmp_path, dropout=0.25, **same).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.dropout.p == again.config.dropout == 0.25
    for other in ({"num_layers": 3}, {"vocab_size": 70}):
        with pytest.raises(RuntimeError, match="mismatch"):
            EncoderCNNForSequenceClassification.from_pretrained(tmp_path, **other)
    for wrong, words in (
        ({"num_layers": 4}, "num_layers must be at most the encoder's 3 layers, got 4"),
        ({"mode": "first"}, "mode must be one of last, last_n, all_cls, scalar_mix, got 'first'"),
        ({"num_hidden_layers": 2}, "num_hidden_layers must be the encoder's, 3, got 2"),
        ({"hidden_size": 32}, "hidden_size must be the encoder's, 16, got 32"),
    ):
        with pytest.raises(ValueError, match=words):
            EncoderCNNForSequenceClassification.from_pretrained(tmp_path, **wrong)


def test_the_vocabulary_is_the_encoders_whichever_way_its_size_is_changed():
    model, config = classifier_on("bert"), copy.deepcopy(classifier_on("bert").config)
    config.vocab_size = 7
    assert EncoderCNNModel(config).get_input_embeddings().num_embeddings == config.encoder.vocab_size == 7
    config.encoder.vocab_size = 9
    assert EncoderCNNModel(config).config.vocab_size == 9
    model.resize_token_embeddings(70)
    assert model.get_input_embeddings().num_embeddings == model.config.encoder.vocab_size == 70


def test_a_recipe_goes_on_from_its_own_checkpoint(tmp_path):
    """`model.head` beside a checkpoint that has been composed already: not an encoder inside an encoder."""
    model, ids = classifier_on("bert"), token_ids(2, 6)
    model.save_pretrained(tmp_path)
    section = ModelSection(checkpoint=str(tmp_path), head="lnlm_encoder_cnn", config={"dropout": 0.25})
    again = load_wrapped(section, "AutoModelForSequenceClassification", **section.config)
    assert type(again.model.encoder) is BertModel
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    assert again.config.dropout == 0.25


def test_sparse_attention_of_the_encoder_is_kept(tmp_path, monkeypatch):
    """Composing and loading must not go back to dense attention: calls are counted."""
    encoder = hf_lnlm.enable_sparse_attention(copy.deepcopy(encoder_of("bert")), "local", stride=2)
    ids, calls = token_ids(2, 9), []
    real = stock.sparse_attention
    monkeypatch.setattr(stock, "sparse_attention", lambda *a, **k: calls.append(1) or real(*a, **k))
    model = EncoderCNNModel.from_encoder_pretrained(encoder)
    features = model(ids).pooler_output
    assert len(calls) == 3
    assert not torch.allclose(features, EncoderCNNModel.from_encoder_pretrained(encoder_of("bert"))(ids).pooler_output)
    model.save_pretrained(tmp_path)
    again = EncoderCNNModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).pooler_output, features)
    assert len(calls) == 6


def test_hidden_states_are_those_asked_for():
    for mode in MODES:
        model = classifier_on("bert", mode)
        ids = token_ids(2, 6)
        assert model(ids).hidden_states is None
        assert len(model(ids, output_hidden_states=True).hidden_states) == 4


def test_padding_that_attention_hides_inside_a_row_is_left_out():
    model = classifier_on("bert", "last_n")
    ids = token_ids(1, 9)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 1]])
    kept = ids[mask.bool()][None]
    torch.testing.assert_close(model(ids, mask).logits, model(kept).logits, rtol=0, atol=1e-5)


def test_resized_embeddings_are_the_encoders():
    model = classifier_on("bert")
    model = add_noise(model, 4)
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == model.config.encoder.vocab_size == 70
    assert model.model.encoder.get_input_embeddings().weight.shape == (70, 16)


def bert(**fields):
    given = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertConfig(**(given | fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mode": "last_n", "num_layers": 3}, "num_layers must be at most the encoder's 2 layers, got 3"),
        ({"mode": "first"}, "mode must be"),
        ({"filter_sizes": []}, "filter_sizes"),
        ({"filter_sizes": [0]}, "filter_sizes"),
        ({"num_filters": 0}, "num_filters"),
        ({"dropout": 1.0}, "dropout"),
        ({"encoder": {"hidden_size": 16}}, "must name its model_type"),
        ({"encoder": {"model_type": "nothing"}}, "knows no model type 'nothing'"),
    ],
)
def test_bad_configs_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        EncoderCNNConfig(**({"encoder": bert()} | fields))


def test_a_tagger_of_first_tokens_is_refused():
    with pytest.raises(ValueError, match="got 'all_cls'"):
        EncoderCNNForTokenClassification(EncoderCNNConfig(encoder=bert(), mode="all_cls"))


def test_an_encoder_without_hidden_states_is_refused_where_they_are_needed():
    class Silent(nn.Module):
        def get_input_embeddings(self):
            return None

        def forward(self, input_ids, output_hidden_states=None, **_):
            return BaseModelOutput(last_hidden_state=torch.zeros(*input_ids.shape, 16))

    model = classifier_on("bert", "last_n")
    model.model.encoder = Silent()
    with pytest.raises(ValueError, match=r"needs the hidden states .* a Silent, got none"):
        model(token_ids(1, 4))


def test_inputs_that_do_not_fit_are_refused():
    model, ids = classifier_on("bert"), token_ids(2, 5)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(2, 5, 16))
    with pytest.raises(ValueError, match=r"no positions: input_ids has shape \(2, 0\)"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match=r"\(2, 5\), got \(2, 4\)"):
        model(ids, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"\(2, 5\), got \(5,\)"):
        model(ids, torch.ones(5))


def test_other_numbers_of_labels_are_refused_on_reload(tmp_path):
    classifier_on("bert").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        EncoderCNNForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model = EncoderCNNForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model(token_ids(1, 4)).logits.shape == (1, 5)


@pytest.mark.parametrize(
    ("fields", "labels", "words"),
    [
        ({}, torch.tensor([0, 1, 2]), r"labels must have shape \(2,\), got \(3,\)"),
        ({}, torch.tensor([0, 3]), "labels must be between 0 and 2, or -100 to be ignored, got 3"),
        ({"problem_type": "single_label_classification"}, torch.tensor([0.0, 1.0]), "labels must be whole numbers"),
        ({"problem_type": "multi_label_classification"}, torch.zeros(2, 4), r"must have shape \(2, 3\), got \(2, 4\)"),
        ({"problem_type": "regression"}, torch.zeros(2), r"regression labels must have shape \(2, 3\), got \(2,\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(fields, labels, words):
    with pytest.raises(ValueError, match=words):
        classifier_on("bert", **fields)(token_ids(2, 5), labels=labels)


def test_checkpoints_without_the_encoders_weights_are_refused():
    source = encoder_of("bert")
    broken = type(source)(source.config)
    broken.encoder.layer = nn.ModuleList(broken.encoder.layer[:2])
    with pytest.raises(ValueError, match="lacks weights of a BertModel"):
        EncoderCNNModel.from_encoder_pretrained(broken)


def test_a_family_without_an_encoder_of_its_own_is_refused():
    with pytest.raises(ValueError, match="no encoder of its own for the model type"):
        EncoderCNNModel(EncoderCNNConfig(encoder=BartConfig(vocab_size=61, d_model=16, encoder_layers=1)))


def test_decoders_and_encoder_halves():
    tiny = GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    assert EncoderCNNModel(EncoderCNNConfig(encoder=tiny)).eval()(token_ids(2, 5)).pooler_output.shape[0] == 2
    half = EncoderCNNModel(EncoderCNNConfig(encoder=T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=2)))
    assert type(half.encoder).__name__ == "T5EncoderModel"


def test_masks_are_filled_from_the_windows_by_hand():
    model = EncoderCNNForMaskedLM(EncoderCNNConfig(encoder=bert(), num_filters=4, filter_sizes=[3], dropout=0.0)).eval()
    add_noise(model, 0)
    ids = token_ids(2, 7)
    labels = torch.full_like(ids, -100)
    labels[0, 2], labels[1, 5] = 3, 4
    output = model(ids, labels=labels)
    states = F.pad(model.model.encoder(ids).last_hidden_state, (0, 0, 1, 1))
    window = model.model.window_head.windows[0]
    taps = window.projection.weight.view(4, 16, 3)
    maps = torch.stack([torch.einsum("fck,bkc->bf", taps, states[:, t : t + 3]) for t in range(7)], dim=1)
    hidden = model.transform((maps + window.projection.bias).relu())
    table = model.model.encoder.embeddings.word_embeddings.weight
    logits = hidden @ table.T + model.lm_head.bias
    assert torch.allclose(output.logits, logits, atol=1e-5)
    assert torch.allclose(output.loss, F.cross_entropy(logits[labels != -100], labels[labels != -100]), atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("loss_head", ["full", "chunked"])
def test_masks_are_filled_over_factorised_embeddings(tied, loss_head):
    fields = {
        "vocab_size": 61,
        "hidden_size": 16,
        "embedding_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
    }
    config = EncoderCNNConfig(encoder=AlbertConfig(**fields), tie_word_embeddings=tied, loss_head=loss_head)
    model = EncoderCNNForMaskedLM(config)
    table = model.get_input_embeddings().weight
    assert (model.lm_head.weight is table) == tied and (model.output_projection is not None) == tied
    model(token_ids(2, 6), labels=token_ids(2, 6)).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "pooler" not in n)
    model.resize_token_embeddings(70)
    assert model(token_ids(2, 6)).logits.shape == (2, 6, 70) and model.config.vocab_size == 70
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_masks_are_not_filled_from_one_token():
    with pytest.raises(ValueError, match="mode must be last, last_n or scalar_mix to fill masks, got 'all_cls'"):
        EncoderCNNForMaskedLM(EncoderCNNConfig(encoder=bert(), mode="all_cls"))


def test_a_model_reads_as_its_encoder_does_and_is_narrowed_with_it():
    known = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2}
    causal = EncoderCNNConfig(encoder={"model_type": "lnlm_rnn", **known, "bidirectional": False})
    assert direction_of(causal) == "forward" and direction_of(EncoderCNNConfig(encoder=bert())) == "both"
    half = EncoderCNNConfig(**narrowed(EncoderCNNConfig(encoder=bert(hidden_size=32), num_filters=6), 0.5))
    assert half.hidden_size == half.encoder.hidden_size == 16 and half.encoder.num_attention_heads == 1
    assert half.num_filters == 6 and half.encoder.intermediate_size == 8
