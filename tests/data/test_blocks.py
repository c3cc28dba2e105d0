"""Tokens, packed blocks, streams of either kind and epochs, on hand-worked cases and on the standard library."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_lnlm.data.blocks import PackedBlocks, PackedStream, pack
from hf_lnlm.data.bptt_streams import BPTTStreams
from hf_lnlm.data.epochs import EpochRows, EpochStream
from hf_lnlm.data.pieces import PIECE, split_text
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.data.tokens import Encoder, byte_offset

from .subwords import subword_tokenizer, texts

BYTE = build_tokenizer("byte")
BOS, EOS, CLS, SEP = 1, 2, 5, 6
TEXT = ["abcd", "é", "xyz"]
# bos a b c d eos | bos é é eos | bos x y z eos
STREAM = [BOS, 104, 105, 106, 107, EOS, BOS, 7 + 0xC3, 7 + 0xA9, EOS, BOS, 127, 128, 129, EOS]
BYTES = [0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0]
POSITIONS = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1, 2, 3, 4]


def rows_of(items: list[str]) -> Dataset:
    return Dataset.from_dict({"text": items})


def ids(row: dict) -> list[int]:
    return row["input_ids"].tolist()


def test_blocks_by_hand() -> None:
    blocks = PackedBlocks(rows_of(TEXT), BYTE, 4)
    assert [ids(blocks[i]) for i in range(len(blocks))] == [STREAM[0:4], STREAM[4:8], STREAM[8:12]]
    assert [blocks[i]["num_bytes"] for i in range(3)] == [3, 2, 2]
    assert [blocks[i]["example_id"] for i in range(3)] == [0, 1, 2]
    assert ids(blocks[-1]) == STREAM[8:12]
    with pytest.raises(IndexError, match=r"0 … 2, got 3"):
        blocks[3]


def test_overlapping_blocks_predict_every_token_once() -> None:
    blocks = PackedBlocks(rows_of(TEXT), BYTE, 5, overlap=1, drop_last=False)
    rows = [blocks[i] for i in range(len(blocks))]
    assert [token for row in rows for token in ids(row)[1:]] == STREAM[1:]
    assert sum(row["num_bytes"] for row in rows) == sum(len(text.encode()) for text in TEXT)
    assert len(ids(rows[-1])) == 3
    assert len(PackedBlocks(rows_of(TEXT), BYTE, 5, overlap=1)) == 3


def test_boundaries_restart_at_documents_and_at_rows() -> None:
    blocks = PackedBlocks(rows_of(TEXT), BYTE, 5, boundaries=True)
    assert [blocks[i]["position_ids"].tolist() for i in range(3)] == [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_head_and_tail_frame_every_row() -> None:
    blocks = PackedBlocks(rows_of(TEXT), BYTE, 6, head=(CLS,), tail=(SEP,), words=True)
    assert ids(blocks[0]) == [CLS, *STREAM[0:4], SEP]
    assert ids(blocks[1]) == [CLS, *STREAM[4:8], SEP]
    assert blocks[0]["word_ids"].tolist() == [-1, -1, 0, 0, 0, -1]


def test_documents_share_one_token_for_both_ends() -> None:
    both = build_tokenizer("byte")
    both.bos_token = both.eos_token = "<eos>"
    assert Encoder(both).encode("a").ids.tolist() == [EOS, 104]
    assert Encoder(both, close=True).encode("a").ids.tolist() == [EOS, 104, EOS]
    assert Encoder(both, frame="none").encode("a").ids.tolist() == [104]


@pytest.mark.parametrize(
    ("frame", "wanted"), [("both", [BOS, 104, EOS]), ("start", [BOS, 104]), ("end", [104, EOS]), ("none", [104])]
)
def test_frames(frame: str, wanted: list[int]) -> None:
    assert Encoder(BYTE, frame=frame).encode("a").ids.tolist() == wanted
    blocks = PackedBlocks(rows_of(["abc", "d"]), BYTE, 2, frame=frame, drop_last=False)
    assert sum(blocks[index]["num_bytes"] for index in range(len(blocks))) == 4
    with pytest.raises(ValueError, match="frame must be one of both, start, end, none, got 'front'"):
        Encoder(BYTE, frame="front")


def test_bert_separates_documents_with_sep() -> None:
    tokenizer = subword_tokenizer("wordpiece")
    assert Encoder(tokenizer).encode("a").ids.tolist()[1:] == [tokenizer.sep_token_id]


def test_special_tokens_written_in_a_document_are_text() -> None:
    for tokenizer in (build_tokenizer("byte", template="bert"), build_tokenizer("bpe", ["a"], vocab_size=263)):
        assert Encoder(tokenizer, frame="none").encode("<eos>").ids.min() >= 7


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (1, {"overlap": 1}, "length must exceed the overlap (1)"),
        (2, {"head": (CLS,), "tail": (SEP,)}, "the 2 special tokens of a row, got 2"),
        (16, {}, "the text is too short: 3 documents with 15 tokens, but one block needs 16"),
        (4, {"head": (CLS,), "boundaries": True}, "boundaries=True goes with rows without head and tail"),
    ],
)
def test_rows_that_can_not_be_cut(length: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PackedBlocks(rows_of(TEXT), BYTE, length, **options)


def test_streams_that_are_too_short_say_so() -> None:
    with pytest.raises(ValueError, match="the stream is too short: 15 tokens, but one block needs 16"):
        list(PackedStream(rows_of(TEXT), BYTE, 16))
    with pytest.raises(ValueError, match="no document"):
        PackedBlocks(rows_of([]), BYTE, 4)


def test_bad_documents_are_named() -> None:
    with pytest.raises(ValueError, match="document 1: a document must be a string, got NoneType"):
        PackedBlocks(rows_of(["a", None]), BYTE, 4)
    with pytest.raises(ValueError, match=r"lone surrogate, U\+D800 at character 2"):
        list(PackedStream([{"text": "ab\ud800"}], BYTE, 4))
    with pytest.raises(ValueError, match="got generator: stream or load it"):
        PackedBlocks((row for row in ()), BYTE, 4)


@pytest.mark.parametrize(
    "options", [{}, {"overlap": 1}, {"boundaries": True, "overlap": 1}, {"head": (CLS,), "words": True}]
)
@pytest.mark.parametrize("kind", ["byte", "wordpiece", "byte-bpe", "unigram"])
def test_stream_gives_the_rows_of_the_blocks(kind: str, options: dict) -> None:
    tokenizer = BYTE if kind == "byte" else subword_tokenizer(kind)
    documents = rows_of(texts())
    blocks, stream = (pack(rows, tokenizer, 64, **options) for rows in (documents, documents.to_iterable_dataset()))
    assert isinstance(blocks, PackedBlocks) and isinstance(stream, PackedStream)
    streamed = list(stream)
    assert len(streamed) == len(blocks) > 50
    for index, row in enumerate(streamed):
        assert row.keys() == blocks[index].keys()
        assert all(np.array_equal(value, blocks[index][name]) for name, value in row.items())


@pytest.mark.parametrize("kind", ["byte", "char", "wordpiece", "byte-bpe", "unigram"])
@given(st.lists(st.text(st.sampled_from("ab \n\té一😀,."), max_size=20), min_size=1, max_size=4))
def test_bytes_of_tokens_sum_to_the_bytes_of_the_text(kind: str, parts: list[str]) -> None:
    tokenizer = {"byte": BYTE, "char": CHAR}.get(kind) or subword_tokenizer(kind)
    text = "".join(parts) + "x"
    tokens = Encoder(tokenizer, words=True).encode(text)
    assert tokens.num_bytes.sum() == len(text.encode())
    assert len(tokens.ids) == len(tokens.num_bytes) == len(tokens.words)


CHAR = build_tokenizer("char", ["ab x"])


@pytest.mark.parametrize("kind", ["byte", "wordpiece", "byte-bpe"])
def test_long_documents_are_tokenised_in_pieces_without_a_trace(kind: str) -> None:
    tokenizer = BYTE if kind == "byte" else subword_tokenizer(kind)
    text = "".join(texts(24))
    assert len(text) > 2 * PIECE
    whole = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    tokens = Encoder(tokenizer, frame="none", words=True).encode(text)
    assert tokens.ids.tolist() == whole["input_ids"]
    assert tokens.num_bytes.sum() == len(text.encode())
    if kind != "byte":
        assert np.array_equal(np.diff(tokens.words) != 0, np.diff(np.array(whole.word_ids())) != 0)


@given(st.text(st.sampled_from("ab \n"), max_size=200), st.integers(1, 30))
def test_pieces_make_the_text(text: str, size: int) -> None:
    pieces = list(split_text(text, size))
    assert "".join(pieces) == text
    assert all(len(piece) <= size for piece in pieces)


def test_words_without_a_pre_tokenizer_come_from_white_space() -> None:
    text = "ab  cd\ne"
    words = [0, 0, 1, 1, 1, 1, 2, 2]
    assert Encoder(BYTE, frame="none", words=True).encode(text).words.tolist() == words
    char = build_tokenizer("char", [text])
    assert Encoder(char, frame="none", words=True).encode(text).words.tolist() == words


def test_only_byte_tokenizers_take_the_byte_path() -> None:
    assert byte_offset(BYTE) == 7
    assert byte_offset(build_tokenizer("byte", sentinels=100, template="bert")) == 7
    assert byte_offset(build_tokenizer("bpe", ["aaab"], vocab_size=264)) is None
    assert byte_offset(CHAR) is None
    assert byte_offset(subword_tokenizer("byte-bpe")) is None


def test_lanes_by_hand() -> None:
    lanes = BPTTStreams(rows_of(TEXT), BYTE, 3, 2)
    assert len(lanes) == 4
    assert [ids(lanes[k]) for k in range(4)] == [STREAM[0:3], STREAM[6:9], STREAM[3:6], STREAM[9:12]]
    assert [lanes[k]["next_id"] for k in range(4)] == [STREAM[3], STREAM[9], STREAM[6], STREAM[12]]
    assert [lanes[k]["reset"] for k in range(4)] == [True, True, False, False]
    assert [lanes[k]["num_bytes"] for k in range(4)] == [3, 2, 1, 2]
    assert "position_ids" not in lanes[0]


def test_lanes_count_positions_across_windows() -> None:
    lanes = BPTTStreams(rows_of(TEXT), BYTE, 3, 2, boundaries=True)
    assert [lanes[k]["position_ids"].tolist() for k in range(4)] == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 0, 1]]
    assert [lanes[k]["next_id"] for k in range(4)] == [STREAM[3], STREAM[9], -100, STREAM[12]]


def test_lanes_are_contiguous_on_real_text() -> None:
    lanes = BPTTStreams(rows_of(texts()), BYTE, 32, 5)
    stream = lanes.tokens.ids.slice(0, len(lanes.tokens))
    for lane in range(5):
        windows = np.concatenate([lanes[window * 5 + lane]["input_ids"] for window in range(lanes.num_windows)])
        assert np.array_equal(windows, stream[lane * len(windows) : (lane + 1) * len(windows)])
    assert len(stream) - 5 * len(windows) < 5 * 32 + 1


def test_lane_shards_are_the_lanes_accelerate_gives_a_process() -> None:
    lanes = BPTTStreams(rows_of(texts()), BYTE, 32, 4)
    for rank in range(2):
        shard = lanes.shard(rank, 2)
        batches = [index for index in range(len(lanes)) if index // 2 % 2 == rank]
        assert [shard[i]["example_id"] for i in range(len(shard))] == batches
    with pytest.raises(ValueError, match="4 streams must be a multiple of world_size"):
        lanes.shard(0, 3)
    with pytest.raises(
        ValueError, match=r"12 documents with \d+ tokens, but 10000 streams of one window of 100 tokens need"
    ):
        BPTTStreams(rows_of(texts()), BYTE, 100, 10_000)


class Collect:
    """A picklable collator that keeps (example_id, epoch)."""

    def __call__(self, rows: list[dict]) -> list[tuple[int, int]]:
        return [(row["example_id"], row["epoch"]) for row in rows]


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("kind", ["blocks", "stream", "lanes", "rows", "row stream"])
def test_epoch_reaches_the_workers(kind: str, workers: int, persistent: bool) -> None:
    documents = rows_of(texts(2))
    dataset = {
        "blocks": lambda: PackedBlocks(documents, BYTE, 500),
        "stream": lambda: PackedStream(documents, BYTE, 500),
        "lanes": lambda: BPTTStreams(documents, BYTE, 500, 2),
        "rows": lambda: EpochRows(rows_of(list("abcdefghij"))),
        "row stream": lambda: EpochStream(rows_of(list("abcdefghij")).to_iterable_dataset()),
    }[kind]()
    loader = DataLoader(dataset, 2, num_workers=workers, persistent_workers=persistent, collate_fn=Collect())
    for epoch in (0, 1, 5):
        dataset.set_epoch(epoch)
        seen = [pair for batch in loader for pair in batch]
        assert seen == [(index, epoch) for index in range(len(seen))]
        assert len(seen) >= 4
    with pytest.raises(ValueError, match="epoch must be 0 or more, got -1"):
        dataset.set_epoch(-1)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_streams_of_many_shards_lose_nothing(workers: int) -> None:
    documents = rows_of(texts(6))
    shards = documents.to_iterable_dataset(num_shards=3)
    wanted = [row["input_ids"].tolist() for row in PackedStream(shards, BYTE, 500)]
    loader = DataLoader(PackedStream(shards, BYTE, 500), 2, num_workers=workers, collate_fn=list)
    assert [row["input_ids"].tolist() for rows in loader for row in rows] == wanted
    assert len(wanted) == len(PackedBlocks(documents, BYTE, 500))


def test_datasets_travel_to_spawned_workers() -> None:
    for dataset in (PackedBlocks(rows_of(texts(2)), BYTE, 100), BPTTStreams(rows_of(texts(2)), BYTE, 10, 2)):
        copy = pickle.loads(pickle.dumps(dataset))
        assert np.array_equal(copy[3]["input_ids"], dataset[3]["input_ids"])


def test_rows_keep_their_own_example_id() -> None:
    rows = EpochRows(Dataset.from_dict({"text": ["a", "b"], "example_id": [7, 9]}))
    assert [rows[i]["example_id"] for i in range(len(rows))] == [7, 9]
    assert torch.utils.data.get_worker_info() is None
