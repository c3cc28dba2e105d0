"""Tokenizers: exact round trips, fixed ids, saving without custom code, agreement with a model's configuration."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from hf_lnlm.data.sources import stdlib_texts
from hf_lnlm.data.tokenizers import (
    KINDS,
    build_tokenizer,
    byte_symbols,
    check_token_ids,
    check_vocabulary,
    sentinel_ids,
)

CORPUS = ["the cat sat on the mat\n", "def f(x):\n    return x + 1\n", "naïve café 一 😀"]
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>", "<mask>", "<cls>", "<sep>"]
BYTE = build_tokenizer("byte", sentinels=10)
ODD_TEXT = st.lists(
    st.sampled_from([*SPECIALS, "<extra_id_3>", " ", "\x00", "\r\n", "\x85", "é", "😀", "n't", " ."])
).map("".join)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.one_of(UNICODE, ODD_TEXT))
def test_byte_gives_back_any_string(text: str) -> None:
    ids = BYTE(text)["input_ids"]
    assert ids == [7 + byte for byte in text.encode()]
    assert BYTE.decode(ids) == text


@given(UNICODE)
def test_bpe_gives_back_any_string(text: str) -> None:
    assert BPE.decode(BPE(text)["input_ids"]) == text


BPE = build_tokenizer("bpe", CORPUS * 20, vocab_size=300)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "elmo"])
def test_special_ids_are_the_same_everywhere(kind: str) -> None:
    tokenizer = build_tokenizer(kind, CORPUS, sentinels=3)
    assert tokenizer.convert_tokens_to_ids(SPECIALS) == list(range(7))
    names = ["pad", "bos", "eos", "unk", "mask", "cls", "sep"]
    assert [getattr(tokenizer, f"{name}_token_id") for name in names] == list(range(7))
    size = len(tokenizer)
    assert sentinel_ids(tokenizer) == [size - 1, size - 2, size - 3]
    assert sorted(tokenizer.get_vocab().values()) == list(range(size))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "elmo"])
@pytest.mark.parametrize("config", [None, BertConfig, GPT2Config, RobertaConfig, T5Config])
def test_saved_tokenizers_load_without_custom_code(kind: str, config: type | None, tmp_path) -> None:
    tokenizer = build_tokenizer(kind, CORPUS, sentinels=2, template="t5" if config is T5Config else None)
    tokenizer.save_pretrained(tmp_path)
    if config is not None:
        config().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is PreTrainedTokenizerFast
    text = "the <mask> cat\n\tMKT naïve<eos>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert sentinel_ids(loaded) == sentinel_ids(tokenizer)


def test_no_special_token_is_added_without_a_template() -> None:
    assert BYTE("a", "b")["input_ids"] == [104, 105]


@pytest.mark.parametrize(
    ("template", "single", "pair"),
    [
        ("bert", [5, 104, 6], [5, 104, 6, 105, 6]),
        ("roberta", [5, 104, 6], [5, 104, 6, 6, 105, 6]),
        ("t5", [104, 2], [104, 2, 105, 2]),
        ("causal", [1, 104], [1, 104, 105]),
    ],
)
def test_templates(template: str, single: list[int], pair: list[int]) -> None:
    tokenizer = build_tokenizer("byte", template=template)
    assert tokenizer("a")["input_ids"] == single
    assert tokenizer("a", "b")["input_ids"] == pair
    if template == "bert":
        assert tokenizer("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]


def test_mask_in_a_text_is_read_where_fill_mask_needs_it() -> None:
    assert build_tokenizer("byte", template="bert")("a<mask>")["input_ids"] == [5, 104, 4, 6]
    assert BYTE("<mask>", split_special_tokens=False)["input_ids"] == [4]


def test_char_knows_the_characters_it_saw() -> None:
    tokenizer = build_tokenizer("char", ["aab\n", "é"])
    assert len(tokenizer) == 7 + 4
    assert tokenizer.convert_ids_to_tokens(7) == "a"
    assert tokenizer("baz é\n")["input_ids"].count(3) == 2
    assert tokenizer.decode(tokenizer("aé\nb")["input_ids"]) == "aé\nb"


def test_word_splits_at_white_space() -> None:
    tokenizer = build_tokenizer("word", ["the cat <unk> the n't"])
    words = ["the", "n't", "<unk>", "dog", "cat"]
    assert tokenizer.convert_ids_to_tokens(tokenizer(" ".join(words))["input_ids"]) == [
        "the",
        "n't",
        "<unk>",
        "<unk>",
        "cat",
    ]


def test_protein_reads_either_case_and_ignores_line_breaks() -> None:
    tokenizer = build_tokenizer("protein")
    assert tokenizer.decode(tokenizer("mkt\nLV x*")["input_ids"]) == "MKTLVX*"
    assert tokenizer("J?1")["input_ids"][1:] == [3, 3]


def test_bpe_learns_from_code() -> None:
    texts = [text for text, _ in zip(stdlib_texts(), range(20), strict=False)]
    tokenizer = build_tokenizer("bpe", texts, vocab_size=600, sentinels=10)
    assert len(tokenizer) == 600
    text = texts[0]
    assert len(tokenizer(text)["input_ids"]) < 0.6 * len(text.encode())
    again = build_tokenizer("bpe", texts, vocab_size=600, sentinels=10)
    assert again.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "bytes"}, "kind must be one of byte, char"),
        ({"kind": "byte", "vocab_size": 300}, "is 263, got 300"),
        ({"kind": "char"}, "built from texts, got none"),
        ({"kind": "word", "texts": ["  "]}, "no word in them"),
        ({"kind": "word", "texts": ["a"], "vocab_size": 5}, "vocab_size must exceed"),
        ({"kind": "bpe", "texts": ["a"], "vocab_size": 100}, "263 or more"),
        ({"kind": "byte", "sentinels": -1}, "sentinels must be 0 or more, got -1"),
        ({"kind": "byte", "template": "gpt"}, "template must be one of bert"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_tokenizer(**arguments)


def test_byte_symbols_are_those_of_byte_level_tokenizers() -> None:
    symbols = byte_symbols()
    assert len(set(symbols)) == 256
    assert symbols[ord(" ")] == "Ġ" and symbols[ord("\n")] == "Ċ" and symbols[ord("a")] == "a"


def _config(**fields: object) -> GPT2Config:
    return GPT2Config(**{"vocab_size": 263, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **fields})


@pytest.mark.parametrize("fields", [{}, {"vocab_size": 320}, {"eos_token_id": [2, 6]}, {"pad_token_id": None}])
def test_agreeing_vocabularies_pass(fields: dict) -> None:
    check_vocabulary(build_tokenizer("byte"), _config(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 262}, "the tokenizer has 263 tokens (highest id 262) but the model's vocab_size is 262"),
        ({"vocab_size": 50257}, "the tokenizer has 263 tokens (highest id 262) but the model's vocab_size is 50257"),
        ({"eos_token_id": 6}, "eos_token_id is 6 in the model's config but 2 ('<eos>') in the tokenizer"),
        ({"pad_token_id": 2}, "pad_token_id is 2 in the model's config but 0"),
        ({"bos_token_id": 50256}, "bos_token_id of the model's config must lie in 0 … 262, got 50256"),
    ],
)
def test_disagreeing_vocabularies_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_vocabulary(build_tokenizer("byte"), _config(**fields))


def test_token_ids_beyond_the_vocabulary_are_named() -> None:
    check_token_ids(np.array([[0, 9]]), 10)
    check_token_ids(np.zeros((0, 4), int), 10)
    with pytest.raises(ValueError, match=r"0 … 9 .*got 10"):
        check_token_ids(np.array([[0, 10]]), 10)
    with pytest.raises(ValueError, match="got -1"):
        check_token_ids(np.array([-1, 10]), 10)
