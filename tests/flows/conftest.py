from ..cli.conftest import _small_stdlib, library, rnn, text_file

__all__ = ["_small_stdlib", "library", "rnn", "text_file"]
