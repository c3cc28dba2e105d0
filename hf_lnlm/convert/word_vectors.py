"""Word vectors of other projects (word2vec and GloVe text files, numpy arrays) into a model's embeddings.

Kim 2014, section 3.2: words of the vocabulary that the file lacks keep their random start; the static channel of the
`multichannel` variant gets the same vectors as the learnt one.
"""

from __future__ import annotations

import gzip
import zipfile
import zlib
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
        ValueError: the file is of another kind, damaged or empty, or holds what is no finite number; the message names
            the file, and of a text the line.
        FileNotFoundError: there is no such file, or no words beside a `.npy`.
    """
    path = Path(path)
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in (".txt", ".vec", ".npy", ".npz") or (path.suffix == ".gz" and kind in (".npy", ".npz")):
        raise ValueError(f"word vectors must be a .txt, .vec, .npy or .npz file (text also .gz), got {path.name}")
    try:
        return _from_text(path, words) if kind in (".txt", ".vec") else _from_numpy(path, words)
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is damaged, got {type(error).__name__}: {error}") from error


def _from_numpy(path: Path, words: set[str] | None) -> Vectors:
    try:
        with path.open("rb") as file:
            loaded: Any = np.load(file, allow_pickle=False)
            if path.suffix == ".npz":
                missing = [name for name in ("words", "vectors") if name not in loaded]
                if missing:
                    raise ValueError(f"it must hold the arrays words and vectors, got {sorted(loaded)}")
                return _from_arrays(path, [str(word) for word in loaded["words"]], loaded["vectors"], words)
    except ValueError as error:  # numpy's own do not name the file
        text = str(error)
        raise ValueError(text if text.startswith(path.name) else f"{path.name}: {text}") from error
    names = path.with_suffix(".txt").read_text(encoding="utf-8").split("\n")
    return _from_arrays(path, [name for name in names if name], loaded, words)


def _from_arrays(path: Path, names: list[str], vectors: np.ndarray, words: set[str] | None) -> Vectors:
    if vectors.ndim != 2 or len(names) != len(vectors) or not names:
        raise ValueError(f"{path.name}: {len(names)} words need an array ({len(names)}, width), got {vectors.shape}")
    if vectors.dtype.kind not in "fiu":
        raise ValueError(f"{path.name}: vectors must hold finite numbers, got {vectors.dtype}")
    found: Vectors = {}
    for name, vector in zip(names, vectors):
        if words is None or name in words:
            found.setdefault(name, _single(vector))
            if not np.isfinite(found[name]).all():
                raise ValueError(f"{path.name}: vectors must hold finite numbers, got nan or inf for {name!r}")
    return found


def _single(numbers: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which is refused
        return np.asarray(numbers).astype(np.float32)


def _lines(path: Path) -> Iterator[str]:
    # Only "\n" ends a line: published files have other separators of lines inside words.
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            yield from file
        return
    with path.open(encoding="utf-8", newline="\n") as plain:
        yield from plain


def _from_text(path: Path, words: set[str] | None) -> Vectors:
    found: Vectors = {}
    width: int | None = None
    promised, number = 0, 0
    for number, line in enumerate(_lines(path), start=1):
        parts = line.rstrip("\r\n ").split(" ")
        if number == 1 and len(parts) == 2 and parts[0].isdigit() and parts[1].isdigit():
            promised, width = int(parts[0]), int(parts[1])  # word2vec's header: how many words, how wide
            continue
        width = len(parts) - 1 if width is None else width
        word = " ".join(parts[: len(parts) - width])
        if width < 1 or not word:
            raise ValueError(f"{path.name}, line {number}: expected a word and {width} numbers, got {line[:60]!r}")
        if (words is None or word in words) and word not in found:
            found[word] = _numbers(parts[len(parts) - width :], path, number)
    if width is None or number - 1 < promised:
        raise ValueError(f"{path.name} is empty or cut off: it promises {promised or 'some'} words, got {number} lines")
    return found


def _numbers(parts: list[str], path: Path, line: int) -> np.ndarray:
    try:
        vector = _single(parts)
    except ValueError:
        raise ValueError(f"{path.name}, line {line}: a vector must hold numbers, got {parts[:4]}") from None
    if not np.isfinite(vector).all():
        wrong = [part for part, value in zip(parts, vector) if not np.isfinite(value)]
        raise ValueError(f"{path.name}, line {line}: a vector must hold finite numbers, got {wrong[:4]}")
    return vector


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
    embeddings = model.get_input_embeddings()
    scale = float(getattr(embeddings, "embed_scale", 1.0))  # the model is to read the vectors as they are
    tables = [embeddings.weight]
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
            table[row] = (vector / scale).to(table)
    return known


def filled_checkpoint(path: Path, into: Path | None, fields: Mapping[str, Any]) -> Any:
    """A checkpoint with its embeddings filled from a file of word vectors, by its tokenizer's words.

    Args:
        path: of the vectors, see `read_word_vectors`.
        into: the checkpoint's folder, with its tokenizer.
        fields: none are taken.

    Raises:
        ValueError: no checkpoint is given, or no word of it has a vector.
    """
    import transformers

    from ..hub.card import auto_class

    if into is None or fields:
        raise ValueError("word vectors fill the embeddings of a checkpoint: give --into CHECKPOINT, and no --set")
    config = transformers.AutoConfig.from_pretrained(into)
    auto = getattr(transformers, auto_class((config.architectures or [""])[0]))
    model = auto.from_pretrained(into, use_safetensors=True)
    words = transformers.AutoTokenizer.from_pretrained(into).get_vocab()
    known = load_word_vectors(model, words, path)
    if not known:
        raise ValueError(f"none of the {len(words)} tokens of {into} is a word of {path.name}")
    return model
