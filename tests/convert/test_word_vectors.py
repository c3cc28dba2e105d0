"""Word vectors: the formats, damaged files, and both channels of TextCNN."""

import gzip

import numpy as np
import pytest
import torch

from hf_lnlm.convert.word_vectors import load_word_vectors, read_word_vectors
from hf_lnlm.models.convolutional.configuration_text_cnn import TextCNNConfig
from hf_lnlm.models.convolutional.modeling_text_cnn import TextCNNForSequenceClassification

TEXT = "the 1 2 3\n. . 0.5 -1 2e-1\ncat 7 8 9\ncat 0 0 0\n"
WANTED = {"the": [1, 2, 3], ". .": [0.5, -1, 0.2], "cat": [7, 8, 9]}


def files(folder):
    (folder / "glove.txt").write_text(TEXT)
    (folder / "word2vec.vec").write_text("4 3\n" + TEXT)
    with gzip.open(folder / "glove.txt.gz", "wt") as file:
        file.write(TEXT)
    words, vectors = list(WANTED), np.array(list(WANTED.values()))
    np.savez(folder / "arrays.npz", words=np.array(words), vectors=vectors)
    np.save(folder / "plain.npy", vectors)
    (folder / "plain.txt").write_text("\n".join(words) + "\n")
    return ["glove.txt", "word2vec.vec", "glove.txt.gz", "arrays.npz", "plain.npy"]


def test_every_format_gives_the_same(tmp_path):
    for name in files(tmp_path):
        found = read_word_vectors(tmp_path / name)
        assert {word: pytest.approx(vector.tolist()) for word, vector in found.items()} == WANTED, name
        assert list(read_word_vectors(tmp_path / name, {"cat", "dog"})) == ["cat"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "the 1 2 3\ncat 1 x 3\n", "line 2"),
        ("a.txt", "the 1 2 3\n4 5 6\n", "line 2"),
        ("a.txt", "the 1 2 3\ncat 1 2\n", "a.txt, line 2: expected a word and 3 numbers, got 'cat 1 2"),
        ("a.txt", "the 1 2 3\ncat 1 nan 3\n", r"a.txt, line 2: .* finite numbers, got \['nan'\]"),
        ("a.txt", "the 1 2 3\ncat 1 1e99 3\n", r"a.txt, line 2: .* finite numbers, got \['1e99'\]"),
        ("a.vec", "2 4\nthe 1 2 3\ncat 1 2 3\n", "a.vec, line 2: expected a word and 4 numbers"),
        ("a.vec", "5 3\nthe 1 2 3\ncat 1 2 3\n", "a.vec is empty or cut off: it promises 5 words, got 3 lines"),
        ("a.txt", "", "a.txt is empty or cut off"),
        ("a.bin", "", "a.bin"),
        ("a.npy.gz", "", "got a.npy.gz"),
        ("a.txt.gz", "the 1 2 3\n", "a.txt.gz is damaged, got BadGzipFile"),
        ("a.npz", "the 1 2 3\n", "a.npz: "),
        ("a.npy", "the 1 2 3\n", "a.npy: "),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        read_word_vectors(tmp_path / name)


def test_cut_off_and_foreign_files_are_named(tmp_path):
    for name in files(tmp_path):
        whole = (tmp_path / name).read_bytes()
        if not name.endswith((".txt", ".vec")):
            (tmp_path / name).write_bytes(whole[: len(whole) // 2])
            with pytest.raises(ValueError, match=name):
                read_word_vectors(tmp_path / name)
    (tmp_path / "latin.txt").write_bytes("caf\xe9 1 2 3\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is damaged, got UnicodeDecodeError"):
        read_word_vectors(tmp_path / "latin.txt")
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        read_word_vectors(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"words": np.array(["a"])}, r"a.npz: it must hold the arrays words and vectors, got \['words'\]"),
        ({"words": np.array(["a"]), "vectors": np.array([["x"]])}, "a.npz: vectors must hold finite numbers, got <U1"),
        ({"words": np.array(["a"]), "vectors": np.array([[np.inf]])}, "a.npz: .* finite numbers, got nan or inf"),
        ({"words": np.array(["a"]), "vectors": np.array([[None]])}, "a.npz: .*allow_pickle=False"),
        ({"words": np.array([]), "vectors": np.ones((0, 2))}, "a.npz: 0 words"),
        ({"words": np.array(["a"]), "vectors": np.ones(3)}, r"a.npz: 1 words need an array \(1, width\), got \(3,\)"),
    ],
)
def test_arrays_that_are_no_word_vectors_are_refused(tmp_path, arrays, says):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=says):
        read_word_vectors(tmp_path / "a.npz")


def test_only_newlines_end_a_line(tmp_path):
    """Words of published files hold other separators of lines; Windows' ends are no part of a number."""
    (tmp_path / "a.txt").write_bytes("the 1 2\r\na\u2028b 3 4\r\nc\x85 5 6\r\n".encode())
    found = read_word_vectors(tmp_path / "a.txt")
    assert {word: vector.tolist() for word, vector in found.items()} == {
        "the": [1, 2], "a\u2028b": [3, 4], "c\x85": [5, 6],
    }  # fmt: skip


def test_words_without_vectors_of_an_array(tmp_path):
    np.savez(tmp_path / "a.npz", words=np.array(["a", "b"]), vectors=np.ones((3, 2)))
    with pytest.raises(ValueError, match="2 words"):
        read_word_vectors(tmp_path / "a.npz")


def test_both_channels_are_filled_and_unknown_words_left():
    torch.manual_seed(0)
    model = TextCNNForSequenceClassification(TextCNNConfig(vocab_size=6, hidden_size=3, variant="multichannel"))
    embeddings = model.model.embeddings
    before = embeddings.embed_tokens.weight.detach().clone()
    vectors = {"cat": np.array([1.0, 2.0, 3.0], dtype=np.float32)}
    assert load_word_vectors(model, {"dog": 2, "cat": 4}, vectors) == ["cat"]
    assert embeddings.embed_tokens.weight[4].tolist() == embeddings.static_tokens.weight[4].tolist() == [1, 2, 3]
    assert torch.equal(embeddings.embed_tokens.weight[[1, 2, 3, 5]], before[[1, 2, 3, 5]])


@pytest.mark.parametrize(("row", "width"), [(2, 4), (9, 3)])
def test_what_does_not_fit_is_refused(row, width):
    model = TextCNNForSequenceClassification(TextCNNConfig(vocab_size=6, hidden_size=3))
    with pytest.raises(ValueError, match=r"\(6, 3\)"):
        load_word_vectors(model, {"cat": row}, {"cat": np.zeros(width, dtype=np.float32)})
