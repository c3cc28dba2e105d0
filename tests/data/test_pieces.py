"""Long texts: what is read, cut and tokenised block by block is what whole texts give, within a bounded memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import config
from hypothesis import given
from hypothesis import strategies as st

from hf_lnlm.data import pieces, readers, tokens
from hf_lnlm.data.blocks import pack
from hf_lnlm.data.pairs import SegmentPairs
from hf_lnlm.data.pieces import halves, lines_of, split_blocks, split_text
from hf_lnlm.data.sources import load_documents
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.data.tokens import Encoder

from .subwords import subword_tokenizer, texts

BYTE = build_tokenizer("byte")
LETTERS = st.text(st.sampled_from("ab \n\r\té😀\u2028"), max_size=12)


@given(st.lists(LETTERS, max_size=8), st.integers(1, 9))
def test_blocks_give_the_lines_and_pieces_of_the_whole(blocks: list[str], size: int) -> None:
    text = "".join(blocks)
    assert list(lines_of(blocks)) == text.splitlines()
    assert list(split_blocks(blocks, size)) == list(split_text(text, size))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch):
    """Handle every text as a long one, in blocks and slabs of a few characters."""

    def shrink() -> None:
        for module in (pieces, readers, tokens):
            for name, value in {"BLOCK": 7, "LONG": 0, "SLAB": 50}.items():
                monkeypatch.setattr(module, name, value, raising=False)

    return shrink


@pytest.mark.parametrize("share", [0.01, 0.5, 0.93, 0.999])
@pytest.mark.parametrize("text", ["é😀b\n" * 9, "é" * 30, "a\n" + "😀é" * 20, "\n" * 10 + "x"])
def test_a_long_document_is_cut_where_a_short_one_is(text: str, share: float, tiny) -> None:
    wanted = [part.to_pylist() for part in halves(pa.scalar(text), share)]
    assert "".join(part[0] for part in wanted) == text
    tiny()
    assert [part.to_pylist() for part in halves(pa.scalar(text), share)] == wanted


@pytest.mark.parametrize("unit", ["file", "line"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1"])
def test_rows_of_long_documents_are_those_of_short_ones(unit: str, encoding: str, tiny, tmp_path: Path) -> None:
    text = "".join(texts(2))[:4000].encode("latin-1", "ignore").decode("latin-1") + "é \r\n\n y" + "z" * 90

    def rows(name: str) -> list:
        Path(tmp_path, name).write_bytes(text.encode(encoding))
        found = load_documents(tmp_path / name, unit=unit, encoding=encoding, validation=0.2)
        streamed = load_documents(tmp_path / name, unit=unit, encoding=encoding, streaming=True)
        sides = [[row["text"] for row in side] for side in (found.train, found.validation, streamed.train)]
        tokenizer = subword_tokenizer("byte-bpe")
        packed = pack(found.train, tokenizer, 32, overlap=1, boundaries=True, words=True)
        stream = pack(streamed.train, BYTE, 32, words=True)
        pairs = SegmentPairs(found.train, tokenizer, 16, words=True, others=False)
        return [sides, [[packed[i] for i in range(len(packed))], list(stream), [pairs[i] for i in range(len(pairs))]]]

    (sides, wanted), _ = rows("short.txt"), tiny()
    again, found = rows("long.txt")
    assert again == sides
    for mine, theirs in zip(found, wanted, strict=True):
        assert len(mine) == len(theirs) > 3
        for row, other in zip(mine, theirs):
            assert row.keys() == other.keys() and all(np.array_equal(row[name], other[name]) for name in row)


def test_words_go_on_where_a_piece_had_to_be_cut_in_one(monkeypatch) -> None:
    text = "a" * 130 + " " * 90 + "b c"
    wanted = Encoder(BYTE, words=True).encode(text)
    monkeypatch.setattr(tokens, "PIECE", 40)
    found = list(Encoder(BYTE, words=True).pieces([text[:50], text[50:]]))
    assert len(found) > 3
    assert all(np.array_equal(np.concatenate(a), b) for a, b in zip(zip(*found), wanted))


def test_a_long_text_that_is_none_is_refused_by_its_byte(tiny, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"good text, " * 9 + b"\xff" + b" more")
    tiny()
    with pytest.raises(ValueError, match=r"bad.txt isn't valid utf-8: byte 0xff at offset 99: name its encoding"):
        load_documents(path)
    assert len(load_documents(path, errors="replace").train[0]["text"]) == 105


@pytest.mark.parametrize("kind", ["file", "tokens"])
def test_a_cache_that_can_not_be_written_is_named(kind: str, tiny, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 30)
    documents = load_documents(tmp_path / "a.txt").train
    (tmp_path / "no folder").write_text("")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "no folder" / "cache")
    tiny()
    with pytest.raises(OSError, match=r"the cache folder of `datasets` can't be written .*: set HF_DATASETS_CACHE"):
        pack(documents, BYTE, 8) if kind == "tokens" else load_documents(tmp_path / "a.txt")


_TRAIN = """
import sys
from hf_lnlm.cli.main import main

data, output, unit = sys.argv[1:]
settings = ["training.max_steps=20", "training.eval_strategy=no", "data.validation=0.001", f"data.unit={unit}"]
model = ["--family", "lnlm_rnn", "--tokenizer", "byte"]
try:
    main(["pretrain", *model, "--data", data, "--output", output, "--set", *settings])
finally:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("peak", int(peak.split()[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak where Linux tells it")
@pytest.mark.parametrize("unit", ["file", "line"])
def test_100_megabytes_train_within_a_gibibyte(unit: str, tmp_path: Path) -> None:
    line = "Some words of one line, as many as lines of text have on average, and a number: {}\n"
    path = tmp_path / "long.txt"
    with path.open("w") as file:
        file.write("😀\n")  # a single wide character makes every character of a `str` take four bytes
        while file.tell() < 100_000_000:
            file.writelines(line.format(number) for number in range(file.tell(), file.tell() + 10_000))
    command = [sys.executable, "-c", _TRAIN, str(path), str(tmp_path / "run"), unit]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.rpartition("peak ")[2]) < 1024
    assert "train_loss" in done.stdout
