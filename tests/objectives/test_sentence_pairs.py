"""Next-sentence and sentence-order prediction: pairs, labels and rows by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import AlbertConfig, AlbertForPreTraining, AutoConfig, AutoModelForMaskedLM, BertConfig, GPT2Config

from hf_lnlm.data.pairs import SegmentPairs
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.models.composed.modeling_sentence_pair import SentencePairForPreTraining
from hf_lnlm.objectives import objective
from hf_lnlm.objectives.sentence_pairs import Part, cut_place, shortened, whole_segments
from tests.data.subwords import texts

TOKENIZER = build_tokenizer("byte", template="bert")
CLS, SEP = 5, 6
LINES = [["aaaa", "bbb", "cccc", "dd"], ["EEEEE", "FFF", "GGGG"], ["1111", "222", "3333", "44", "5555"]]
DOCUMENTS = Dataset.from_dict({"text": ["\n\n".join(lines) for lines in LINES]})
NAMES = ("next_sentence", "sentence_order")


def test_chunks_are_consecutive_lines_of_one_document() -> None:
    pairs = SegmentPairs(DOCUMENTS, TOKENIZER, 12)
    read = ["".join(TOKENIZER.convert_ids_to_tokens(row["input_ids"])) for row in (pairs[i] for i in range(len(pairs)))]
    assert "".join(read) == "".join(map("".join, LINES)), "all text, once, in order"
    assert max(map(len, read)) <= 12
    for index, row in enumerate(pairs[i] for i in range(len(pairs))):
        document = pairs.chunks[index, 2]
        lines, at = "|".join(LINES[document]), "".join(TOKENIZER.convert_ids_to_tokens(row["input_ids"]))
        cut = [at[a:b] for a, b in zip(row["segments"], [*row["segments"][1:], len(at)])]
        assert "|".join(cut) in lines
        other = "".join(TOKENIZER.convert_ids_to_tokens(row["other_ids"]))
        assert other not in "".join(LINES[document]), "the other text is another document's"


def test_other_documents_are_drawn_anew_every_epoch() -> None:
    pairs = SegmentPairs(DOCUMENTS, TOKENIZER, 8)
    first = [pairs[i]["other_ids"].tolist() for i in range(len(pairs))]
    assert first == [pairs[i]["other_ids"].tolist() for i in range(len(pairs))]
    pairs.set_epoch(1)
    assert first != [pairs[i]["other_ids"].tolist() for i in range(len(pairs))]


def test_long_lines_are_cut_and_words_are_numbered_on() -> None:
    documents = Dataset.from_dict({"text": ["one two three four five six seven", "x y\nz"]})
    pairs = SegmentPairs(documents, TOKENIZER, 16, words=True)
    row = pairs[0]
    assert len(row["segments"]) >= 2 and len(row["word_ids"]) == len(row["input_ids"])
    last = next(row for row in (pairs[i] for i in range(len(pairs))) if len(row["input_ids"]) == 4)
    assert last["word_ids"].tolist() == [0, 1, 1, 2] and last["other_word_ids"].shape == last["other_ids"].shape


def test_parts_by_hand() -> None:
    first, second, other = (Part(np.array(ids), np.full(len(ids), -1)) for ids in ([1, 2], [3], [9, 9]))
    following, order = objective("next_sentence"), objective("sentence_order")
    assert [p.ids.tolist() for p in following.pair(first, second, other, False)] == [[1, 2], [3]]
    assert [p.ids.tolist() for p in following.pair(first, second, other, True)] == [[1, 2], [9, 9]]
    assert [p.ids.tolist() for p in order.pair(first, second, other, True)] == [[3], [1, 2]]
    random = np.random.default_rng(0)
    assert {cut_place(np.array([0, 3, 5]), 8, random) for _ in range(50)} == {3, 5}
    assert {cut_place(np.array([0]), 3, random) for _ in range(50)} == {1, 2}, "a single segment is cut too"
    long = Part(np.arange(10), np.arange(10))
    cut = [shortened(long, second, 8, random)[0].ids for _ in range(50)]
    assert {len(ids) for ids in cut} == {7}
    assert len({ids[0] for ids in cut}) > 1 and all((np.diff(ids) == 1).all() for ids in cut), "from front and back"


@pytest.mark.parametrize("name", NAMES)
def test_rows(name: str) -> None:
    learnt = objective(name)
    rows = learnt.rows(DOCUMENTS, TOKENIZER, 11)
    batch = learnt.collator(TOKENIZER, seed=2)([rows[i] for i in range(len(rows))])
    labels = batch[learnt.label]
    original = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    for index, row in enumerate(original):
        tokens = row[batch["attention_mask"][index].bool()].tolist()
        assert tokens[0] == CLS and tokens[-1] == SEP and tokens.count(SEP) == 2
        cut = tokens.index(SEP)
        assert batch["token_type_ids"][index].tolist()[: len(tokens)] == [0] * (cut + 1) + [1] * (len(tokens) - cut - 1)
        a, b = ("".join(TOKENIZER.convert_ids_to_tokens(part)) for part in (tokens[1:cut], tokens[cut + 1 : -1]))
        whole = "".join(LINES[rows.chunks[index, 2]])
        swapped = (b + a) if name == "sentence_order" and labels[index] else a + b
        assert (swapped in whole) == (name == "sentence_order" or not labels[index])
    special = (original == CLS) | (original == SEP) | (original == 0)
    assert (batch["labels"][special] == -100).all(), "special tokens aren't predicted"


@pytest.mark.parametrize("name", NAMES)
def test_half_the_pairs_are_changed(name: str) -> None:
    learnt = objective(name)
    rows = learnt.rows(Dataset.from_dict({"text": texts(8)}), TOKENIZER, 32)
    collate = learnt.collator(TOKENIZER)
    labels = torch.cat([collate([{**rows[i], "epoch": e} for i in range(len(rows))])[learnt.label] for e in range(4)])
    assert len(labels) > 500 and float(labels.float().mean()) == pytest.approx(0.5, abs=0.06)


def test_whole_words_and_spans_of_words() -> None:
    for options in ({"spans": "ngram"}, {"whole_word": True}):
        learnt = objective("sentence_order", **options)
        rows = learnt.rows(Dataset.from_dict({"text": texts(6)}), TOKENIZER, 48)
        collate, whole, masked = learnt.collator(TOKENIZER), 0, 0
        for number in range(40):
            chosen = (collate([rows[number]])["labels"][0] != -100).numpy()
            words = np.asarray(collate._row(rows[number])["word_ids"])
            starts = np.r_[True, words[1:] != words[:-1]] | (words < 0)
            word_of = np.cumsum(starts)
            for word in np.unique(word_of[chosen]):
                masked += 1
                whole += bool(chosen[word_of == word].all())
        assert masked > 40 and whole == masked, "no piece of a chosen word is left, in either part"


def test_the_models_of_each_family() -> None:
    sizes = {"vocab_size": 263, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    albert = AlbertConfig(**sizes, embedding_size=8, intermediate_size=16)
    assert isinstance(objective("sentence_order").build(albert), AlbertForPreTraining)
    rnn = AutoConfig.for_model("lnlm_rnn", vocab_size=263, hidden_size=16, num_hidden_layers=1, bidirectional=True)
    for config in (albert, rnn, BertConfig(**sizes, intermediate_size=16)):
        for name in NAMES:
            learnt = objective(name)
            learnt.check(config, TOKENIZER)
            composed = isinstance(learnt.build(config), SentencePairForPreTraining)
            stock = (config.model_type, name) in {("albert", "sentence_order"), ("bert", "next_sentence")}
            assert composed != stock == learnt.has_stock_head(config)


def test_the_composed_model_by_hand_and_saved(tmp_path) -> None:
    torch.manual_seed(0)
    learnt = objective("sentence_order")
    config = AutoConfig.for_model("lnlm_rnn", vocab_size=263, hidden_size=16, num_hidden_layers=1, bidirectional=True)
    model = learnt.build(config).eval()
    rows = learnt.rows(DOCUMENTS, TOKENIZER, 11)
    batch = learnt.collator(TOKENIZER)([rows[i] for i in range(len(rows))])
    with torch.no_grad():
        found = model(**batch)
        inner = model.encoder(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        )
        relation = model.classifier(torch.tanh(model.pooler(inner.hidden_states[-1][:, 0])))
        words = functional.cross_entropy(inner.logits.flatten(0, 1), batch["labels"].flatten())
        wanted = words + functional.cross_entropy(relation, batch["sentence_order_label"])
    assert float(found.loss) == pytest.approx(float(wanted), rel=1e-5)
    metrics = learnt.summary(learnt.sums(learnt.logits(found), batch))
    assert metrics["loss"] == pytest.approx(float(wanted), rel=1e-5)
    model.save_pretrained(tmp_path)
    alone = AutoModelForMaskedLM.from_pretrained(tmp_path / "encoder").eval()
    with torch.no_grad():
        logits = alone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert torch.equal(logits, found.prediction_logits)
        assert torch.equal(SentencePairForPreTraining.from_pretrained(tmp_path).eval()(**batch).loss, found.loss)


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"gpt2 reads left to right only.*Models that fit '{name}': .*bert.*albert"):
        objective(name).check(GPT2Config(), TOKENIZER)


def test_what_does_not_fit_is_refused() -> None:
    learnt = objective("sentence_order")
    bare = build_tokenizer("byte")
    bare.cls_token = None
    with pytest.raises(ValueError, match="needs a cls token"):
        learnt.check(BertConfig(), bare)
    with pytest.raises(ValueError, match="text of two documents or more, got 1"):
        objective("next_sentence").rows(DOCUMENTS.select([0]), TOKENIZER, 16)
    with pytest.raises(ValueError, match="text of one document, got 0"):
        learnt.rows(Dataset.from_dict({"text": [" \n"]}), TOKENIZER, 16)
    assert "other_ids" not in learnt.rows(DOCUMENTS.select([0]), TOKENIZER, 16)[0], (
        "their order needs one document only"
    )
    with pytest.raises(ValueError, match="got a stream"):
        learnt.rows(iter(DOCUMENTS), TOKENIZER, 16)
    with pytest.raises(ValueError, match="length must leave 4 tokens or more for a pair, got 3"):
        learnt.rows(DOCUMENTS, TOKENIZER, 6)
    with pytest.raises(ValueError, match="changed_share must lie between 0 and 1"):
        objective("next_sentence", changed_share=1.0)


def test_a_random_second_part_begins_and_ends_where_segments_do():
    part, borders = Part(np.arange(20), np.arange(20)), [0, 4, 9, 15]
    for seed in range(30):
        cut = whole_segments(part, borders, 12, np.random.default_rng(seed)).ids
        assert cut[0] in borders[:2] and cut[-1] + 1 in (9, 15)
        assert len(cut) <= 12
    long = whole_segments(part, [0], 5, np.random.default_rng(0))
    assert len(long) == 20, "one segment is taken whole, and shortened later"


def test_a_model_of_the_other_relation_is_refused():
    from hf_lnlm.models.composed.modeling_sentence_pair import compose

    config = compose(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2), "next_sentence_label"
    ).config
    with pytest.raises(ValueError, match="needs a model with sentence_order_label, and this one was made with next"):
        objective("sentence_order").check(config, None)
