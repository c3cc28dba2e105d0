"""Word vectors of other projects (word2vec and GloVe text files, numpy arrays) into a model's embeddings.

Kim 2014, section 3.2: words of the vocabulary that the file lacks keep their random start; the static channel of the
`multichannel` variant gets the same vectors as the learnt one.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

Vectors = dict[str, np.ndarray]


def read_word_vectors(path: str | Path, words: set[str] | None = None) -> Vectors:
    """Read word vectors from a file.

    Args:
        path: a text file (`.txt`, `.vec`, also `.gz`): a word and its numbers a line, word2vec's header line allowed; or
            numpy's `.npz` with arrays `words` `(n,)` and `vectors` `(n, width)`; or `.npy` with the vectors, and beside it
            a `.txt` of the same stem with a word a line.
        words: keep these only; None for all.

    Returns:
        word → float32 vector; the first one counts if a word comes twice.

    Raises:
        ValueError: the file is of another kind or damaged; the message names file and line.
    """
    path = Path(path)
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return _from_arrays(path, [str(word) for word in arrays["words"]], arrays["vectors"], words)
    if kind == ".npy":
        names = path.with_suffix(".txt").read_text(encoding="utf-8").split("\n")
        return _from_arrays(path, [name for name in names if name], np.load(path, allow_pickle=False), words)
    if kind in (".txt", ".vec"):
        return _from_text(path, words)
    raise ValueError(f"word vectors must be a .txt, .vec, .npy or .npz file (text also .gz), got {path.name}")


def _from_arrays(path: Path, names: list[str], vectors: np.ndarray, words: set[str] | None) -> Vectors:
    if vectors.ndim != 2 or len(names) != len(vectors):
        raise ValueError(f"{path.name}: {len(names)} words need an array ({len(names)}, width), got {vectors.shape}")
    found: Vectors = {}
    for name, vector in zip(names, vectors):
        if words is None or name in words:
            found.setdefault(name, vector.astype(np.float32))
    return found


def _lines(path: Path) -> Iterator[str]:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from file
        return
    with path.open(encoding="utf-8") as plain:
        yield from plain


def _from_text(path: Path, words: set[str] | None) -> Vectors:
    found: Vectors = {}
    width: int | None = None
    for number, line in enumerate(_lines(path), start=1):
        parts = line.rstrip("\n ").split(" ")
        if number == 1 and len(parts) == 2 and parts[0].isdigit() and parts[1].isdigit():
            width = int(parts[1])  # word2vec's header: how many words, how wide
            continue
        width = len(parts) - 1 if width is None else width
        word = " ".join(parts[: len(parts) - width])
        if width < 1 or not word:
            raise ValueError(f"{path.name}, line {number}: expected a word and {width} numbers, got {line[:60]!r}")
        if (words is None or word in words) and word not in found:
            found[word] = _numbers(parts[len(parts) - width :], path, number)
    return found


def _numbers(parts: list[str], path: Path, line: int) -> np.ndarray:
    try:
        return np.array(parts, dtype=np.float32)
    except ValueError:
        raise ValueError(f"{path.name}, line {line}: a vector must hold numbers, got {parts[:4]}") from None


@torch.no_grad()
def load_word_vectors(model: Any, vocabulary: Mapping[str, int], vectors: Vectors | str | Path) -> list[str]:
    """Copy word vectors into a model's input embeddings.

    Args:
        model: any transformers model; of TextCNN's `multichannel` variant both channels are filled.
        vocabulary: word → id, as a tokenizer's `get_vocab()`.
        vectors: word → vector, or a file for `read_word_vectors`.

    Returns:
        the words that have a vector, in the order of the vocabulary.

    Raises:
        ValueError: the vectors are not as wide as the embeddings, or an id is beyond them.
    """
    if not isinstance(vectors, dict):
        vectors = read_word_vectors(vectors, set(vocabulary))
    tables = [model.get_input_embeddings().weight]
    tables += [weight for name, weight in model.named_parameters() if name.endswith("static_tokens.weight")]
    known = [word for word in vocabulary if word in vectors]
    for word in known:
        vector, row = torch.from_numpy(np.asarray(vectors[word], dtype=np.float32)), vocabulary[word]
        if vector.shape != tables[0].shape[1:] or not 0 <= row < tables[0].shape[0]:
            raise ValueError(
                f"embeddings {tuple(tables[0].shape)} have no place for {word!r}, got id {row} and a vector of "
                f"{tuple(vector.shape)}"
            )
        for table in tables:
            table[row] = vector.to(table)
    return known
