"""ELMo: words of a stream, the character CNN by hand, each direction, state, the mix, targets, and bad inputs."""

from __future__ import annotations

import math

import pytest
import torch

import hf_lnlm
from hf_lnlm import ElmoConfig, ElmoForPreTraining, ElmoForSequenceClassification, ElmoForTokenClassification, ElmoModel
from hf_lnlm.nn.character_cnn import Highway
from hf_lnlm.nn.scalar_mix import ScalarMix
from hf_lnlm.nn.words import distinct, find_words, spelling_keys

TINY = {
    "embedding_size": 4,
    "filter_sizes": [1, 3],
    "num_filters": [6, 8],
    "hidden_size": 12,
    "cell_size": 10,
    "target_vocab_size": 50,
    "classifier_dropout": 0.0,
    "dropout": 0.0,
}
TOKENIZER = hf_lnlm.build_tokenizer("elmo", template="causal")
TEXTS = ["the cat saw the other cat", "a word"]


def model_of(cls: type = ElmoModel, **fields):
    torch.manual_seed(0)
    model = cls(ElmoConfig(**{**TINY, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def spelled(words: list[str]) -> list[list[int]]:
    """Words as AllenNLP spells them: begin, bytes, end, filler, each one up."""
    rows = []
    for word in words:
        symbols = {"<S>": [256], "</S>": [257]}.get(word, list(word.encode())[:48])
        rows.append([id + 1 for id in [258, *symbols, 259, *[260] * (48 - len(symbols))]])
    return rows


def given(texts: list[str]) -> torch.Tensor:
    rows = [spelled(["<S>", *text.split(), "</S>"]) for text in texts]
    longest = max(map(len, rows))
    return torch.tensor([row + [[0] * 50] * (longest - len(row)) for row in rows])


def batch_of(texts: list[str], side: str = "right"):
    TOKENIZER.padding_side = side
    return TOKENIZER(texts, return_tensors="pt", padding=True)


def test_ids_are_elmos_own():
    assert TOKENIZER("Ä b").input_ids == [257, 259, 0xC3 + 1, 0x84 + 1, 259, ord("b") + 1, 258]
    assert len(TOKENIZER) == ElmoConfig().vocab_size == 262
    pieces = TOKENIZER(["New", "York"], is_split_into_words=True)
    assert pieces.word_ids() == [None, *[0] * 4, *[1] * 5, None]


def test_words_are_found_in_a_stream():
    # 9 begins a word, 7 is one by itself, 0 is padding; places: begin, 3 characters at most, end.
    ids = torch.tensor([[7, 9, 1, 2, 0, 3, 9, 4, 7], [5, 6, 0, 9, 1, 2, 3, 4, 9]])
    found = find_words(ids == 9, ids == 7, ids > 0, places=5, window=0, traced=False)
    symbols = torch.cat([ids, torch.tensor([[90, 91, 92]] * 2)], 1)
    rows = [symbols[row][found.sources[row]].tolist() for row in range(2)]
    assert rows[0] == [[90, 7, 91, 92, 92], [9, 1, 2, 3, 91], [9, 4, 91, 92, 92], [90, 7, 91, 92, 92]]
    assert rows[1][:3] == [[90, 5, 6, 91, 92], [9, 1, 2, 3, 91], [9, 91, 92, 92, 92]]  # the second is cut
    assert found.mask.tolist() == [[True] * 4, [True] * 3 + [False]]
    assert found.owner.tolist() == [[0, 1, 1, 1, 4, 1, 2, 2, 3], [0, 0, 4, 1, 1, 1, 1, 1, 2]]


def test_a_stream_and_spelled_words_are_one_input():
    model = model_of()
    texts = [*TEXTS, "x" * 60, "naïve Zürich"]
    with torch.no_grad():
        words = model(given(texts))
        for side in ("left", "right"):
            stream = model(**batch_of(texts, side))
            for one, other in zip(stream.layers, words.layers, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    ids = batch_of(texts).input_ids
    begins = (ids >= 257) & (ids <= 259)
    for row, length in enumerate(words.word_mask.sum(1).tolist()):
        at_words = stream.last_hidden_state[row, begins[row]]
        torch.testing.assert_close(at_words, words.last_hidden_state[row, :length], rtol=0, atol=1e-6)


def test_what_is_left_out_changes_nothing():
    """Each different word once and the used places alone, against all 50 places of every word."""
    model, ids = model_of(), given(TEXTS)
    with torch.no_grad():
        quick = model.word_vectors(model.spelled(batch_of(TEXTS).input_ids, batch_of(TEXTS).attention_mask, None))
        plain = model.characters(model.embed(ids).flatten(0, 1)).view(*ids.shape[:2], -1)
    torch.testing.assert_close(quick[0], plain[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(quick[1, :4], plain[1, :4], rtol=0, atol=1e-6)


def test_spellings_are_told_apart():
    words = torch.tensor(spelled(["cat", "act", "cat", "tac", "ca"]))
    once, which = distinct(words, 261)
    assert len(once) == 4 and torch.equal(once[which], words)
    keys = spelling_keys(words, 261)
    assert keys[0] == keys[2] and len(set(keys.tolist())) == 4
    assert torch.equal(keys, spelling_keys(words[:, :7], 261)), "filler doesn't count"


def test_highway_by_hand():
    layer = Highway(1)
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), (2.0, 1.0, -1.0, 0.5), strict=True):
            parameter.fill_(value)
        # x = 3: transform 2·3 + 1 = 7, gate sigmoid(-3 + 0.5)
        gate = 1 / (1 + math.exp(2.5))
        assert layer(torch.tensor([[3.0]])).item() == pytest.approx(gate * 7 + (1 - gate) * 3, rel=1e-6)


def test_the_maximum_of_a_map_comes_before_the_activation():
    model = model_of(filter_sizes=[2], num_filters=[3], num_highways=0, activation="tanh")
    word = torch.tensor(spelled(["ab"]))
    frames, layer = model.embed(word)[0], model.characters.convolutions[0]
    kernel = layer.projection.weight.view(3, 4, 2)
    scores = torch.stack([(kernel * frames[t : t + 2].T).sum((1, 2)) for t in range(49)]) + layer.projection.bias
    wanted = model.characters.projection(scores.amax(0).tanh())
    torch.testing.assert_close(model.characters(model.embed(word))[0], wanted)


@pytest.mark.parametrize("skips", [True, False])
def test_a_word_is_seen_by_the_direction_that_reads_it(skips):
    model, words = model_of(use_skip_connections=skips), given(["one two three four"])
    other = words.clone()
    other[0, 3] = torch.tensor(spelled(["else"]))[0]
    with torch.no_grad():
        one, two = model(words).layers, model(other).layers
    for layer in (1, 2):
        ahead, behind = ((a - b).abs().amax(-1)[0] for a, b in zip(one[layer].chunk(2, -1), two[layer].chunk(2, -1)))
        assert (ahead[:3] < 1e-6).all() and (ahead[3:] > 1e-5).all()
        assert (behind[4:] < 1e-6).all() and (behind[:4] > 1e-5).all()


def test_skip_connections_add_the_input_of_all_layers_but_the_first():
    plain, skipping = model_of(use_skip_connections=False), model_of(use_skip_connections=True)
    with torch.no_grad():
        one, two = plain(given(TEXTS)).layers, skipping(given(TEXTS)).layers
    torch.testing.assert_close(one[1], two[1])
    torch.testing.assert_close(one[2] + one[1], two[2])


def test_a_state_goes_on_where_it_ended():
    model, whole = model_of(num_hidden_layers=1), given(["one two three four"])
    with torch.no_grad():
        once = model(whole, output_state=True)
        first = model(whole[:, :4], output_state=True)
        rest = model(whole[:, 4:], state=first.final_state)
    assert model(whole).final_state is None
    size = 6
    torch.testing.assert_close(rest.layers[1][..., :size], once.layers[1][:, 4:, :size])
    torch.testing.assert_close(rest.final_state[0][:, 0], once.final_state[0][:, 0])
    ragged = model(given(TEXTS), output_state=True)
    alone = model(given(TEXTS[1:]), output_state=True)
    for one, other in zip(ragged.final_state, alone.final_state, strict=True):
        torch.testing.assert_close(one[:, :, 1], other[:, :, 0])


def test_scalar_mix_by_hand():
    layers = [torch.tensor([[[1.0, 3.0], [9.0, 9.0]]]), torch.tensor([[[2.0, 2.0], [5.0, 5.0]]])]
    mix = ScalarMix(2)
    with torch.no_grad():
        mix.weights.copy_(torch.tensor([0.0, math.log(3.0)]))
        mix.scale.fill_(2.0)
    assert mix(layers)[0, 0].tolist() == pytest.approx([2 * (0.25 * 1 + 0.75 * 2), 2 * (0.25 * 3 + 0.75 * 2)])
    normed = ScalarMix(1, layer_norm=True)(layers[:1], torch.tensor([[True, False]]))
    assert normed[0, 0].tolist() == pytest.approx([-1.0, 1.0])  # mean 2, deviation 1; what is masked doesn't count


def test_pretraining_predicts_words_both_ways():
    model, batch = model_of(ElmoForPreTraining), batch_of(TEXTS)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    with torch.no_grad():
        found = model(**batch, labels=labels)
        keys = spelling_keys(given(TEXTS), 261).remainder(50)
        total, count = [0.0, 0.0], 0
        for row, length in enumerate([8, 4]):
            ahead, back = found.logits[row].log_softmax(-1), found.backward_logits[row].log_softmax(-1)
            for word in range(length - 1):
                total[0] -= float(ahead[word, keys[row, word + 1]])
                total[1] -= float(back[word + 1, keys[row, word]])
                count += 1
    assert found.counts.tolist() == [count, count]
    assert found.sums.tolist() == pytest.approx(total, rel=1e-5)
    assert float(found.loss) == pytest.approx(sum(total) / 2 / count, rel=1e-5)
    trained = model.train()(**batch, labels=labels)
    assert trained.logits is None and trained.loss.item() == pytest.approx(found.loss.item(), rel=1e-5)
    items = model.loss_items({**batch, "labels": labels})
    assert {name: int(value) for name, value in items.items()} == {"forwards": count, "backwards": count}


def test_what_has_no_label_is_not_predicted():
    model, batch = model_of(ElmoForPreTraining), batch_of(TEXTS[:1])
    labels = torch.full_like(batch.input_ids, -100)
    labels[0, 5] = 1  # where "cat" begins
    assert model(**batch, labels=labels).counts.tolist() == [1, 1]


def test_tags_are_a_words_and_texts_are_sums_of_words():
    tagger, batch = model_of(ElmoForTokenClassification, num_labels=5), batch_of(TEXTS)
    with torch.no_grad():
        logits = tagger(**batch).logits
    assert torch.equal(logits[0, 1], logits[0, 3]) and not torch.equal(logits[0, 4], logits[0, 5])
    mean = model_of(ElmoForSequenceClassification, pooling="mean")
    with torch.no_grad():
        outputs = mean.model(given(TEXTS))
        wanted = mean.classifier(mean.mix(outputs.layers)[1, :4].mean(0))
        torch.testing.assert_close(mean(**batch).logits[1], wanted)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"input_ids": torch.ones(1, 2, 49, dtype=torch.long)}, r"or \(batch, words, 50\), got \(1, 2, 49\)"),
        ({"input_ids": torch.full((1, 2, 50), 262)}, r"between 0 and vocab_size - 1 \(261\), got 262"),
        ({"input_ids": torch.ones(1, 2, 50)}, "must be whole numbers"),
        ({"input_ids": torch.ones(1, 0, 50, dtype=torch.long)}, "has no positions"),
        (
            {
                "input_ids": torch.ones(2, 3, dtype=torch.long),
                "state": (torch.zeros(2, 2, 1, 6), torch.zeros(2, 2, 1, 10)),
            },
            r"state must hold h and c of shapes .*got \(\(2, 2, 1, 6\)",
        ),
    ],
)
def test_bad_inputs_are_named(inputs, said):
    with pytest.raises(ValueError, match=said):
        model_of()(**inputs)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden_size": 7}, "hidden_size holds both directions: it must be even, got 7"),
        ({"num_filters": [1, 2, 3]}, r"one for each of filter_sizes \(2\), got 3"),
        ({"filter_sizes": [1, 60]}, r"must not exceed max_word_length \(50\), got 60"),
        ({"activation": "gelu"}, "activation must be one of relu, tanh, got 'gelu'"),
        ({"cell_clip": -1.0}, "cell_clip must be between"),
        ({"vocab_size": 5}, "vocab_size must be between 6"),
        ({"bos_token_id": 259}, "word_start_token_id must differ from bos_token_id and eos_token_id, got 259"),
        ({"vocab_size": 99, "eos_token_id": [2, 4]}, "word_end_token_id must differ from bos_token_id and eos"),
        ({"filler_token_id": 260}, "filler_token_id must differ from word_end_token_id, got 260"),
        ({"word_start_token_id": 0}, "word_start_token_id must differ from pad_token_id, got 0"),
    ],
)
def test_bad_configs_are_named(fields, said):
    with pytest.raises(ValueError, match=said):
        ElmoConfig(**{**TINY, **fields})


def test_another_tokenizer_is_refused():
    from hf_lnlm.data.tokenizers import check_vocabulary

    check_vocabulary(TOKENIZER, ElmoConfig())
    with pytest.raises(ValueError, match=r"needs a tokenizer of the kind elmo"):
        check_vocabulary(hf_lnlm.build_tokenizer("byte"), ElmoConfig(vocab_size=263))


@pytest.mark.parametrize(
    "cls", [ElmoModel, ElmoForPreTraining, ElmoForSequenceClassification, ElmoForTokenClassification]
)
def test_symbols_stay_when_the_vocabulary_is_resized(cls):
    model = model_of(cls)
    with pytest.raises(ValueError, match="spelled with ids up to 261: they need 262, got 100"):
        model.resize_token_embeddings(100)
    assert model.config.vocab_size == 262 and len(model.get_input_embeddings().weight) == 262
    last = model_of(cls, bos_token_id=261, word_start_token_id=4, word_end_token_id=5, filler_token_id=6)
    with pytest.raises(ValueError, match="ids up to 261"):
        last.resize_token_embeddings(200)
    batch = batch_of(TEXTS)
    with torch.no_grad():
        before = model(**batch)[0]
        model.resize_token_embeddings(300)
        torch.testing.assert_close(model(**batch)[0], before)
    assert model.config.word_start_token_id == 259


def test_the_published_model_has_93_6_million_weights():
    with torch.device("meta"):
        assert round(ElmoModel(ElmoConfig()).num_parameters() / 1e6, 1) == 93.6
