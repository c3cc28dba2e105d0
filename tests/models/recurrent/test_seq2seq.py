"""The recurrent encoder-decoder beyond the contract: equations, scores by hand, search, ties, vocabularies, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Seq2SeqTrainer, Seq2SeqTrainingArguments, default_data_collator, set_seed

from hf_lnlm import (
    RNNSeq2SeqConfig,
    RNNSeq2SeqForConditionalGeneration,
    RNNSeq2SeqForSequenceClassification,
    RNNSeq2SeqModel,
)
from hf_lnlm.models.recurrent.source_attention import ATTENTIONS, SourceAttention
from hf_lnlm.nn.inputs import CACHE_FIELD
from tests.contract.cases import PAD, add_noise, token_ids

from . import seq2seq_reference as reference

TIGHT = {"rtol": 1e-9, "atol": 1e-11}
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
START, END = 1, 2
SPECIAL = {"pad_token_id": 0, "bos_token_id": START, "eos_token_id": END}


def config(**fields: Any) -> RNNSeq2SeqConfig:
    tiny = {"vocab_size": 61, "hidden_size": 6, "embedding_size": 5, "attention_size": 4, "num_hidden_layers": 2}
    return RNNSeq2SeqConfig(**(tiny | SPECIAL | fields))


def make(cls: Any = RNNSeq2SeqForConditionalGeneration, seed: int = 1, **fields: Any) -> Any:
    torch.manual_seed(seed)
    return add_noise(cls(config(**fields)), seed).eval()


SHAPES = [
    {"cell_type": "gru", "bridge": "tanh"},
    {"input_feeding": True, "project_embeddings": False},
    {"input_feeding": True, "cell_type": "gru", "encoder_layers": 1, "bridge": "zero"},
    {"bidirectional": False, "reverse_source": True, "encoder_layers": 3, "bridge": "copy"},
]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("fields", SHAPES, ids=lambda fields: "-".join(map(str, fields.values())))
def test_equals_the_equations_wherever_padding_lies(attention: str, fields: dict[str, Any]):
    window = {"local_window": 2} if attention == "local_p" else {}
    model = make(RNNSeq2SeqModel, attention=attention, **window, **fields).double()
    sources, targets = [[5, 9, 33, 7, 12], [8, 40, 3]], [[1, 20, 31], [1, 22, 9, 60]]
    ids, mask = torch.full((2, 7), PAD), torch.zeros(2, 7, dtype=torch.long)
    decoder_ids, decoder_mask = torch.full((2, 6), PAD), torch.zeros(2, 6, dtype=torch.long)
    places = ([0, 2, 3, 5, 6], [4, 5, 6]), ([0, 1, 2], [1, 3, 4, 5])
    for row in range(2):
        ids[row, places[0][row]], mask[row, places[0][row]] = torch.tensor(sources[row]), 1
        decoder_ids[row, places[1][row]], decoder_mask[row, places[1][row]] = torch.tensor(targets[row]), 1
    with torch.no_grad():
        found = model(ids, mask, decoder_ids, decoder_mask, output_attentions=True)
        for row in range(2):
            vectors, weights = reference.run(model, sources[row], targets[row])
            seen = found.last_hidden_state[row, places[1][row]]
            torch.testing.assert_close(seen, vectors, **TIGHT)
            if attention != "none":
                seen = found.cross_attentions[0][row, 0][places[1][row]][:, places[0][row]]
                torch.testing.assert_close(seen, weights, **TIGHT)


def bare(attention: str, **fields: Any) -> SourceAttention:
    """An attention two wide whose matrices are the identity and whose vectors are ones."""
    made = SourceAttention(config(attention=attention, hidden_size=2, attention_size=2, **fields))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.eye(2) if parameter.shape[0] == 2 else torch.ones(1, 2))
    return made


def softmax(*scores: float) -> list[float]:
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


@pytest.mark.parametrize("attention", ["dot", "general", "concat", "additive"])
def test_scores_by_hand(attention: str):
    h, values = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    made = bare(attention)
    if attention == "general":  # W_a swaps the features
        made.key.weight.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    context, alignment = made(h, made.read(values, None))
    wanted = {
        "dot": softmax(1, 2),  # h · h_s
        "general": softmax(2, 1),  # h · W_a h_s
        "concat": softmax(math.tanh(2) + math.tanh(2), math.tanh(1) + math.tanh(3)),  # v · tanh(W h + U h_s)
    }
    wanted["additive"] = wanted["concat"]
    assert alignment[0, 0].tolist() == pytest.approx(wanted[attention], abs=1e-6)
    assert context[0, 0].tolist() == pytest.approx(wanted[attention], abs=1e-6)  # the values are unit vectors


@pytest.mark.parametrize(("window", "inside"), [(2, [0, 1, 2, 3]), (1, [1, 2, 3])])
def test_gaussian_of_local_p_by_hand(window: int, inside: list[int]):
    made = bare("local_p", local_window=window)
    h, values = torch.zeros(1, 1, 2), torch.randn(1, 4, 2)  # equal scores, sigmoid(0) = 1/2: the middle p = 4 / 2
    _, alignment = made(h, made.read(values, None))
    gauss = [math.exp(-((s - 2) ** 2) / (2 * (window / 2) ** 2)) if s in inside else 0.0 for s in range(4)]
    assert alignment[0, 0].tolist() == pytest.approx([g / len(inside) for g in gauss], abs=1e-6)


def test_additive_looks_from_the_state_before_and_concat_from_the_present_one():
    ids, two = token_ids(1, 6), torch.tensor([[1, 30], [17, 30]])
    for attention, same in (("additive", True), ("concat", False)):
        model = make(RNNSeq2SeqModel, attention=attention)
        found = model(ids.expand(2, -1), decoder_input_ids=two, output_attentions=True).cross_attentions[0][:, 0]
        first, second = (found[0] - found[1]).detach().abs().amax(-1)[:2].tolist()
        assert (first < 1e-7) == same  # the first token isn't in s_0
        assert second > 1e-5


def test_feeding_reads_the_vector_of_the_step_before():
    model = make(RNNSeq2SeqModel, input_feeding=True)
    ids, target = token_ids(2, 6), token_ids(2, 4)
    plain = model(ids, decoder_input_ids=target).last_hidden_state
    gates = model.decoder.walk.layers[0].forwards.input_gates
    with torch.no_grad():
        gates.weight[:, -model.config.hidden_size :] = 0
    deaf = model(ids, decoder_input_ids=target).last_hidden_state
    torch.testing.assert_close(plain[:, 0], deaf[:, 0], **TOLERANCE)  # nothing is fed at first
    assert not torch.allclose(plain[:, 1], deaf[:, 1], atol=1e-3)


@pytest.mark.parametrize("attention", ["general", "additive", "none"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_of_the_loop_are_those_of_autograd(attention: str, cell: str, monkeypatch: pytest.MonkeyPatch):
    fields = {"attention": attention, "cell_type": cell, "input_feeding": True}
    ids, labels, found = token_ids(3, 6), token_ids(3, 5), []
    for by_hand in (True, False):
        if not by_hand:
            monkeypatch.setattr("hf_lnlm.models.recurrent.decoder_steps.by_hand", lambda tensor: False)
        model = make(**fields).double()
        loss = model(ids, labels=labels).loss
        first = torch.autograd.grad(loss, model.model.encoder.embed_tokens.weight, retain_graph=True)[0]
        loss.backward()  # asking for one gradient first leaves nothing behind
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.testing.assert_close(first, gradients["model.encoder.embed_tokens.weight"], **TIGHT)
        found.append(gradients)
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], **TIGHT, msg=lambda m, n=name: f"{n}: {m}")


def without_end(**fields: Any) -> Any:
    model = make(**fields)
    model.generation_config.eos_token_id = None
    return model


HOW = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 4, "num_return_sequences": 4, "do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
}
DECODERS = [{"attention": "local_p"}, {"attention": "additive"}, {"input_feeding": True}, {"attention": "none"}]


@pytest.mark.parametrize("fields", DECODERS, ids=str)
@pytest.mark.parametrize("how", HOW)
def test_generation_with_and_without_state_of_padded_rows(fields: dict[str, Any], how: str):
    model, ids, mask = without_end(**fields), token_ids(3, 8), torch.ones(3, 8, dtype=torch.long)
    for row, padding in enumerate((0, 3, 5)):
        ids[row, :padding], mask[row, :padding] = PAD, 0
    options, found = {"max_new_tokens": 8, "eos_token_id": None, **HOW[how]}, []
    for more in ({"use_cache": True}, {"use_cache": False}):
        set_seed(7)
        found.append(model.generate(ids, attention_mask=mask, **options, **more))
    assert torch.equal(*found)
    if how == "sampling":
        return
    returned = HOW[how].get("num_return_sequences", 1)
    for row, padding in enumerate((0, 3, 5)):
        alone = model.generate(ids[row : row + 1, padding:], **options)
        assert torch.equal(found[0][row * returned : (row + 1) * returned], alone)
        encoded = model.get_encoder()(ids[row : row + 1, padding:])
        assert torch.equal(model.generate(encoder_outputs=encoded, **options), alone)
    whole = model(ids, mask, found[0].view(3, returned, -1)[:, 0], output_attentions=True)
    if how == "greedy":
        assert torch.equal(whole.logits[:, :-1].argmax(-1), found[0][:, 1:])


@pytest.mark.parametrize("fields", DECODERS[:3], ids=str)
def test_pieces_equal_the_whole_and_other_states_are_refused(fields: dict[str, Any]):
    model, ids, target = make(**fields), token_ids(2, 6), token_ids(2, 7)
    mask = torch.ones_like(target)
    mask[0, :2], mask[1, 4] = 0, 0
    with torch.no_grad():
        whole = model(ids, None, target, mask, use_cache=False).logits
        cache, pieces = None, []
        for start, stop in ((0, 3), (3, 4), (4, 7)):
            out = model(ids, None, target[:, start:stop], mask[:, :stop], past_key_values=cache, use_cache=True)
            cache = out[CACHE_FIELD]
            pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, 1)[mask == 1], whole[mask == 1], **TOLERANCE)
        assert cache.get_seq_length() == 7
        for wrong in (DynamicCache(config=model.config), make(num_hidden_layers=1)(ids, labels=ids)[CACHE_FIELD]):
            with pytest.raises(ValueError, match="past_key_values must be an EncoderDecoderCache"):
                model(ids, decoder_input_ids=target, past_key_values=wrong)
        with pytest.raises(ValueError, match="past_key_values holds the state of"):
            model(ids[:1], decoder_input_ids=target[:1], past_key_values=cache)


def log_probability(model: Any, ids: torch.Tensor, sequence: torch.Tensor) -> float:
    """Sum of the log-probabilities of what follows the start token, up to the end token."""
    with torch.no_grad():
        logits = model(ids, decoder_input_ids=sequence[None, :-1], use_cache=False).logits.log_softmax(-1)
    chosen = logits[0].gather(1, sequence[1:, None]).squeeze(1)
    ends = (sequence[1:] == END).nonzero()
    return float(chosen[: int(ends[0]) + 1 if len(ends) else None].sum())


@pytest.mark.parametrize("fields", [*DECODERS, {"cell_type": "gru", "input_feeding": True}], ids=str)
def test_beams_are_rescored_by_brute_force(fields: dict[str, Any]):
    model, ids = make(**fields), token_ids(2, 6)
    options = {"num_beams": 5, "num_return_sequences": 5, "do_sample": False, "length_penalty": 0.0}
    found = model.generate(ids, max_new_tokens=7, output_scores=True, return_dict_in_generate=True, **options)
    for row, (sequence, score) in enumerate(zip(found.sequences, found.sequences_scores, strict=True)):
        rescored = log_probability(model, ids[row // 5 : row // 5 + 1], sequence)
        assert float(score) == pytest.approx(rescored, abs=1e-4)


@pytest.mark.parametrize("fields", DECODERS[1:3], ids=str)
def test_wide_beams_are_exhaustive_search(fields: dict[str, Any]):
    model, ids, steps = make(vocab_size=5, **fields), torch.tensor([[3, 4, 4, 3]]), 3
    candidates = set()
    for tokens in itertools.product(range(5), repeat=steps):
        cut = tokens.index(END) + 1 if END in tokens else steps
        candidates.add((START, *tokens[:cut]))
    scores = {made: log_probability(model, ids, torch.tensor(made)) for made in candidates}
    best = sorted(scores, key=scores.__getitem__, reverse=True)[:3]
    options = {"num_beams": 30, "num_return_sequences": 3, "do_sample": False, "length_penalty": 0.0}
    found = model.generate(ids, max_new_tokens=steps, output_scores=True, return_dict_in_generate=True, **options)
    assert found.sequences_scores.tolist() == pytest.approx([scores[made] for made in best], abs=1e-4)
    for made, sequence in zip(best, found.sequences.tolist(), strict=True):
        assert tuple(sequence[: len(made)]) == made


def test_lengths_can_be_constrained():
    model, ids = make(), token_ids(3, 6)
    found = model.generate(ids, min_new_tokens=5, max_new_tokens=5, num_beams=2, forced_eos_token_id=END)
    assert found.shape == (3, 6)
    assert (found[:, 1:5] != END).all()
    assert (found[:, 5] == END).all()
    assert model.generate(ids, do_sample=False, max_length=4).shape[1] <= 4


def test_labels_are_shifted_behind_the_start_token_whatever_side_is_padded():
    model, ids = make(), token_ids(2, 5)
    labels = torch.tensor([[7, 8, 9, END, -100, -100], [-100, -100, 7, 8, 9, END]])
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    assert shifted.tolist() == [[START, 7, 8, 9, END, 0], [0, 0, START, 7, 8, 9]]
    losses = [model(ids[:1], labels=labels[row : row + 1]).loss for row in range(2)]
    torch.testing.assert_close(*losses)
    alone = model(ids[:1], labels=labels[:1, :4]).loss
    torch.testing.assert_close(losses[0], alone)
    with pytest.raises(ValueError, match="decoder_start_token_id must be given"):
        RNNSeq2SeqForConditionalGeneration(config(**dict.fromkeys(SPECIAL)))(ids, labels=ids)
    with pytest.raises(ValueError, match="exactly one of decoder_input_ids and decoder_inputs_embeds, got neither"):
        model(ids)


class Shifted:
    """A collator that gives the decoder's input, as `DataCollatorForSeq2Seq` does with a tokenizer."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = default_data_collator(rows)
        return batch | {"decoder_input_ids": self.model.prepare_decoder_input_ids_from_labels(batch["labels"])}


def test_stock_trainer_smooths_labels_and_predicts_by_generation(tmp_path):
    set_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 12, (64, 4))]
    model = RNNSeq2SeqForConditionalGeneration(config(vocab_size=12, hidden_size=32, embedding_size=None))
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        label_smoothing_factor=0.1,
        predict_with_generate=True,
        generation_max_length=5,
        max_steps=100,
        per_device_train_batch_size=32,
        learning_rate=2e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    trainer = Seq2SeqTrainer(model, arguments, Shifted(model), rows)
    trainer.train()
    found = trainer.predict(rows)
    right = torch.tensor(found.predictions[:, 1:5]) == torch.stack([row["labels"] for row in rows])
    assert right.float().mean() > 0.8  # to copy is learnt
    batch = {"input_ids": torch.stack([row["input_ids"] for row in rows])}
    with torch.no_grad():
        logs = -model.eval()(**batch, labels=batch["input_ids"]).logits.log_softmax(-1)
    wanted = 0.9 * logs.gather(2, batch["input_ids"][..., None]).mean() + 0.1 * logs.mean()
    assert found.metrics["test_loss"] == pytest.approx(float(wanted), rel=1e-4)


def test_an_empty_source_is_one_without_a_real_token():
    model, target = make(), token_ids(2, 4)
    empty, masked = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    wanted = model(input_ids=masked, attention_mask=masked, decoder_input_ids=target).logits
    found = model(input_ids=empty, attention_mask=empty, decoder_input_ids=target).logits
    torch.testing.assert_close(found, wanted)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    written = [model.generate(ids, attention_mask=ids, **options) for ids in (empty, masked)]
    assert torch.equal(*written)


def test_ties_are_what_the_config_says():
    pairs = {(True, True), (True, False), (False, True), (False, False)}
    for share, tie in pairs:
        model = make(share_embeddings=share, tie_word_embeddings=tie)
        source, target = model.model.encoder.embed_tokens.weight, model.model.decoder.embed_tokens.weight
        assert (source is target) == share
        assert (model.lm_head.weight is target) == tie
        assert len(model.all_tied_weights_keys) == share + tie


def test_two_vocabularies(tmp_path):
    model = make(source_vocab_size=90, share_embeddings=False)
    ids, target = torch.tensor([[80, 89, 3]]), torch.tensor([[1, 60]])
    wanted = model(ids, decoder_input_ids=target).logits
    assert wanted.shape == (1, 2, 61)
    model.save_pretrained(tmp_path)
    again = RNNSeq2SeqForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(ids, decoder_input_ids=target).logits, wanted)
    with pytest.raises(ValueError, match=r"^input_ids must be between 0 and vocab_size - 1 \(89\), got 90"):
        model(ids + 1, decoder_input_ids=target)
    with pytest.raises(ValueError, match=r"decoder_input_ids must be between 0 and vocab_size - 1 \(60\), got 61"):
        model(ids, decoder_input_ids=target + 1)
    with pytest.raises(ValueError, match="two vocabularies can't be resized"):
        model.resize_token_embeddings(100)
    with pytest.raises(ValueError, match="share_embeddings needs one vocabulary"):
        config(source_vocab_size=90)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attention": "luong"}, "attention must be one of none, dot"),
        ({"attention": "dot", "encoder_hidden_size": 4}, "attention='dot' needs an encoder as wide as hidden_size"),
        ({"bridge": "copy", "encoder_hidden_size": 4}, "bridge='copy' needs an encoder as wide"),
        ({"reverse_source": True}, "reverse_source is for an encoder of one direction"),
        ({"pad_token_id": 50, "source_vocab_size": 40, "share_embeddings": False}, "pad_token_id must be below"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder must be true"),
        ({"local_window": 0}, "local_window must be between"),
        ({"local_window": 3}, "local_window is for attention='local_p'"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(fields: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        config(**fields)


def test_a_source_without_final_states_is_refused():
    model, ids = make(), token_ids(2, 5)
    hidden = model.get_encoder()(ids).last_hidden_state
    with pytest.raises(ValueError, match="needs the encoder's final states"):
        model(encoder_outputs=(hidden,), decoder_input_ids=ids)
    with pytest.raises(ValueError, match="must have the decoder's 2 rows, got 1"):
        make(bridge="zero")(encoder_outputs=(hidden[:1],), decoder_input_ids=ids)


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_classifier_reads_the_encoder_of_a_translator(pooling: str, tmp_path):
    translator, ids = (
        make(bidirectional=False, reverse_source=True, encoder_hidden_size=4, pooling=pooling),
        token_ids(2, 5),
    )
    translator.save_pretrained(tmp_path)
    model, told = RNNSeq2SeqForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert told["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert not told["unexpected_keys"]
    hidden = translator.get_encoder()(ids).last_hidden_state
    wanted = {"last": hidden[:, 0], "mean": hidden.mean(1), "max": hidden.amax(1)}[pooling]
    torch.testing.assert_close(model(ids).logits, model.classifier(wanted))
