from __future__ import annotations

import pytest

from .running import QUICK, copy_library, settings, small_library, succeed


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """A few modules of the standard library, in a folder."""
    return copy_library(tmp_path_factory.mktemp("library"))


@pytest.fixture(autouse=True)
def _small_stdlib(library):
    with small_library(library):
        yield


@pytest.fixture(scope="session")
def text_file(library, tmp_path_factory):
    """One text file of a few thousand characters."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((library / "textwrap.py").read_text())
    return path


@pytest.fixture(scope="session")
def rnn(text_file, tmp_path_factory):
    """A checkpoint of ours, made by the command, of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "rnn"
    words = ["--family", "lnlm_rnn", "--data", text_file, "--tokenizer", "byte", "--output", folder]
    succeed("pretrain", *words, *settings(*QUICK, "data.block_size=32", "training.per_device_train_batch_size=4"))
    return folder
