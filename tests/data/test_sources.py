"""Sources: every kind of file, splits that hold, and one clear error for every bad input."""

from __future__ import annotations

import gzip
import json
import re
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from hf_lnlm.data.blocks import pack
from hf_lnlm.data.readers import FileOptions
from hf_lnlm.data.sources import load_documents, open_source, stdlib_texts
from hf_lnlm.data.tokenizers import build_tokenizer


def texts_of(rows) -> list[str]:
    return [row["text"] for row in rows]


@pytest.fixture
def records() -> list[dict]:
    return [{"text": f'line one\nnumber {i}, "é"', "label": i % 2} for i in range(3)]


def write(path: Path, content: str | bytes) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def test_stdlib_is_split_by_file() -> None:
    documents = load_documents("stdlib", validation=0.1)
    train, held = texts_of(documents.train), texts_of(documents.validation)
    assert documents.train.column_names == documents.validation.column_names == ["text"]
    assert 0.05 < len(held) / (len(train) + len(held)) < 0.15
    assert not set(train) & set(held)
    assert sorted(train + held) == sorted(stdlib_texts())
    source = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text("utf-8")
    assert source in train + held
    assert not any("class Test_Assertions(unittest.TestCase)" in text for text in train)


def test_stdlib_streams_the_same_documents() -> None:
    whole, streamed = (load_documents("stdlib", validation=0.1, streaming=flag) for flag in (False, True))
    assert isinstance(streamed.train, IterableDataset)
    assert texts_of(streamed.validation) == texts_of(whole.validation)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_records(kind: str, ending: str, streaming: bool, records: list[dict], tmp_path) -> None:
    if kind == "tsv":  # has no records of several lines
        records = [{"text": row["text"].replace("\n", " "), "label": row["label"]} for row in records]
    table = Dataset.from_list(records)
    content = {
        "jsonl": lambda: "\n".join(json.dumps(row) for row in records),
        "json": lambda: json.dumps(records, indent=1),
        "csv": lambda: table.to_pandas().to_csv(index=False),
        "tsv": lambda: "text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in records),
        "parquet": lambda: _parquet(records),
    }[kind]()
    path = write(tmp_path / f"data.{kind}{ending}", content)
    assert texts_of(load_documents(path, streaming=streaming).train) == [row["text"] for row in records]
    rows = list(open_source(path, FileOptions(), streaming)[0])
    assert [int(row["label"]) for row in rows] == [0, 1, 0]
    with pytest.raises(
        ValueError, match=r"no column 'body'; its columns are 'text', 'label': choose one with text_column"
    ):
        list(load_documents(path, text_column="body", streaming=streaming).train)


def _parquet(records: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()


def test_text_files_are_documents_or_lines(tmp_path) -> None:
    write(tmp_path / "b.txt", "two\r\n\n  \nlines")
    write(tmp_path / "a.py", "print(1)\n")
    write(tmp_path / "c.log.gz", "three")
    write(tmp_path / ".hidden", "x")
    assert texts_of(load_documents(tmp_path).train) == ["print(1)\n", "two\r\n\n  \nlines", "three"]
    assert texts_of(load_documents(tmp_path, unit="line").train) == ["print(1)", "two", "lines", "three"]
    assert texts_of(load_documents(tmp_path / "*.txt").train) == ["two\r\n\n  \nlines"]
    assert texts_of(load_documents(str(tmp_path / "*"), limit=2).train) == ["print(1)\n", "two\r\n\n  \nlines"]


def test_lists_of_sources_and_empty_files_among_others(tmp_path) -> None:
    write(tmp_path / "a.txt", "a"), write(tmp_path / "b.txt", ""), write(tmp_path / "c.jsonl", '{"text": "c"}')
    assert texts_of(load_documents([tmp_path / "c.jsonl", tmp_path / "*.txt"]).train) == ["c", "a"]
    assert texts_of(load_documents(tmp_path).train) == ["a", "c"]
    with pytest.raises(FileNotFoundError, match=r"no such file, folder or glob: .*nothing"):
        load_documents([tmp_path / "a.txt", tmp_path / "nothing"])


def test_fasta(tmp_path) -> None:
    path = write(tmp_path / "p.fasta.gz", ">one a\nMKT\nlv*\n\n>empty\n>two\nAC D\n")
    rows = list(open_source(path, FileOptions())[0])
    assert rows == [{"text": "MKTLV*", "name": "one a"}, {"text": "ACD", "name": "two"}]
    assert texts_of(load_documents(path).train) == ["MKTLV*", "ACD"]


def test_a_changed_file_is_read_again(tmp_path) -> None:
    path = write(tmp_path / "a.txt", "old")
    assert texts_of(load_documents(path).train) == ["old"]
    write(path, "newer")
    assert texts_of(load_documents(path).train) == ["newer"]


def test_saved_datasets_and_datasets_objects(records: list[dict], tmp_path) -> None:
    table = Dataset.from_list(records)
    table.save_to_disk(tmp_path / "one")
    DatasetDict({"train": table, "validation": table.select([0])}).save_to_disk(tmp_path / "two")
    wanted = [row["text"] for row in records]
    assert texts_of(load_documents(tmp_path / "one").train) == wanted
    assert texts_of(load_documents(tmp_path / "one", streaming=True).train) == wanted
    two = load_documents(tmp_path / "two")
    assert texts_of(two.train) == wanted and texts_of(two.validation) == wanted[:1]
    assert texts_of(load_documents(table.rename_column("text", "body"), text_column="body").train) == wanted
    assert open_source(DatasetDict({"train": table}), FileOptions())[0].column_names == ["text", "label"]


def test_validation_by_source(tmp_path) -> None:
    train, held = write(tmp_path / "a.txt", "train"), write(tmp_path / "b.txt", "held")
    documents = load_documents(train, validation=held)
    assert texts_of(documents.validation) == ["held"]
    assert load_documents(train).validation is None


def test_a_document_is_always_on_the_same_side(tmp_path) -> None:
    lines = [f"line {index % 150}" for index in range(300)]
    first = load_documents(write(tmp_path / "a.txt", "\n".join(lines)), unit="line", validation=0.2)
    second = load_documents(write(tmp_path / "b.txt", "\n".join(reversed(lines))), unit="line", validation=0.2)
    sides = [set(texts_of(side)) for side in (first.train, first.validation, second.train, second.validation)]
    assert sides[0] == sides[2] and sides[1] == sides[3]
    assert not sides[0] & sides[1]
    assert 0.1 < len(first.validation) / 300 < 0.3
    third = load_documents(tmp_path / "a.txt", unit="line", validation=0.2, seed=1)
    assert set(texts_of(third.validation)) != sides[1]
    streamed = load_documents(tmp_path / "a.txt", unit="line", validation=0.2, streaming=True)
    assert texts_of(streamed.validation) == texts_of(first.validation)


def test_few_documents_still_give_both_sides(tmp_path) -> None:
    lines = load_documents(write(tmp_path / "a.txt", "one\ntwo\nthree"), unit="line", validation=0.001)
    assert (len(lines.train), len(lines.validation)) == (2, 1)
    lines = load_documents(tmp_path / "a.txt", unit="line", validation=0.999)
    assert (len(lines.train), len(lines.validation)) == (1, 2)


def test_a_single_document_is_cut_at_a_line(tmp_path) -> None:
    path = write(tmp_path / "a.txt", "".join(f"line {index}\n" for index in range(100)))
    documents = load_documents(path, validation=0.1)
    (train,), (held,) = texts_of(documents.train), texts_of(documents.validation)
    assert train + held == path.read_text()
    assert held.startswith("line 9") and 0.05 < len(held) / len(train) < 0.15
    with pytest.raises(ValueError, match=r"too little text \(1 characters\) to set 0.1 of it aside"):
        load_documents(write(tmp_path / "b.txt", "x"), validation=0.1)


BAD_FILES = [
    ("a.txt", b"", "no text in {path}: no text and no record"),
    ("a.txt", b" \n", "no text in {path}"),
    ("a.jsonl", b"\n", "no text in {path}"),
    ("a.csv", b"text,label\n", "no text in {path}"),
    ("a.txt", b"good \xff bad", "{path} isn't valid utf-8: byte 0xff at offset 5"),
    ("a.txt", b"good \xe9", "(encoding=latin-1?), or read it as it is with errors=replace or errors=ignore"),
    ("a.txt", "text".encode("utf-16"), "encoding=utf-16?"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "{path}, line 2 (row 2): not JSON (Expecting value at column"),
    ("a.jsonl", b'{"text": "a"}\n"text"\n', "{path}, line 2 (row 2): must be an object with named columns, got text"),
    ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "{path}, line 2 (row 2): no column 'text'; its columns are 'body'"),
    ("a.jsonl", b'{"text": 3}', "{path}, line 1 (row 1): column 'text' must hold text, got a number (3)"),
    ("a.json", b"[{]", "{path}, line 1: not JSON"),
    ("a.jsonl", b"[" * 100_000, "{path}: not JSON that can be read"),
    ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "{path}, line 1 (row 1): not JSON that can be read"),
    ("a.csv", b"text,label\na\n", "{path}, line 2 (row 1): a record of 2 columns wanted"),
    ("a.csv", b"text,label\na,1,2\n", "{path}, line 2 (row 1): a record of 2 columns wanted"),
    ("a.parquet", b"PAR1 not really", "{path} isn't a whole Parquet file"),
    ("a.fasta", b"MKT\n>a\n", "{path}, line 1: a FASTA file starts with a '>' line, got 'MKT'"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files(name: str, content: bytes, message: str, streaming: bool, tmp_path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=re.escape(message.format(path=path))) as caught:
        list(load_documents(path, streaming=streaming).train)
    assert "\n" not in str(caught.value)


def test_bad_gzip_files(tmp_path) -> None:
    path = tmp_path / "a.txt.gz"
    for content in (b"no gzip", gzip.compress(b"x" * 1000)[:-9]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="gz can't be read"):
            load_documents(path)


def test_errors_and_encoding_are_the_way_out(tmp_path) -> None:
    path = write(tmp_path / "a.txt", b"caf\xe9")
    assert texts_of(load_documents(path, encoding="latin-1").train) == ["café"]
    assert texts_of(load_documents(path, errors="replace").train) == ["caf\ufffd"]
    assert texts_of(load_documents(path, errors="ignore").train) == ["caf"]
    assert texts_of(load_documents(write(path, b"\xef\xbb\xbfhi")).train) == ["hi"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"errors": "loud"}, "errors must be strict, replace or ignore, got 'loud'"),
        ({"unit": "word"}, "unit must be file or line, got 'word'"),
        ({"encoding": "utf-9"}, "encoding must be one that Python knows"),
        ({"validation": 1.0}, "validation must lie between 0 and 1 (exclusive) or be a source, got 1.0"),
        ({"limit": 0}, "limit must be 1 or more, got 0"),
    ],
)
def test_bad_options(arguments: dict, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_documents(write(tmp_path / "a.txt", "text"), **arguments)


def test_missing_sources(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file, folder or glob: .*nothing"):
        load_documents(tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match="no file, folder, glob or dataset called 'nosuchdata'"):
        load_documents("nosuchdata")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="the folder has no file"):
        load_documents(tmp_path / "empty")
    with pytest.raises(ValueError, match="no text in the data"):
        load_documents(Dataset.from_dict({"text": []}))
    with pytest.raises(ValueError, match="no column 'text'; its columns are 'a', 'b'"):
        load_documents(Dataset.from_dict({"a": ["x"], "b": ["y"]}))


def test_half_a_saved_dataset(tmp_path) -> None:
    Dataset.from_dict({"text": ["a"] * 100}).save_to_disk(tmp_path)
    part = next(tmp_path.glob("*.arrow"))
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(ValueError, match="isn't a whole saved dataset"):
        load_documents(tmp_path)


def test_one_line_of_50_megabytes(tmp_path) -> None:
    path = write(tmp_path / "long.txt", "lorem ipsum " * (50_000_000 // 12))
    documents = load_documents(path).train
    blocks = pack(documents, build_tokenizer("byte"), 512)
    assert len(blocks) == (path.stat().st_size + 2) // 512
    assert sum(blocks[i]["num_bytes"] for i in range(0, len(blocks), 997)) == 512 * len(range(0, len(blocks), 997)) - 1
