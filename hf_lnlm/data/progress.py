"""Work that `datasets` does for us: bars on terminals only, and a cache that can't be written named in the user's words."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def datasets_at_work() -> Iterator[None]:
    """Hide the progress bars of `datasets` where standard error is no terminal.

    Raises:
        OSError: its cache folder can't be written; names the folder and the variable that moves it.
    """
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not are_progress_bars_disabled() and not sys.stderr.isatty()
    if hide:
        disable_progress_bars()
    try:
        yield
    except Exception as error:
        _name_the_cache(error)
        raise
    finally:
        if hide:
            enable_progress_bars()


def _name_the_cache(error: BaseException) -> None:
    """Raise the error about the cache folder if that is what is behind `error`."""
    from datasets import config

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    folder = Path(config.HF_DATASETS_CACHE)
    if cause is None or cause.errno is None or not _concerns(cause.filename, folder):
        return
    raise OSError(
        cause.errno,
        f"the cache folder of `datasets` can't be written ({os.strerror(cause.errno)}): set HF_DATASETS_CACHE to another",
        str(folder),
    ) from None


def _concerns(name: object, folder: Path) -> bool:
    """Whether a file lies in a folder, or the folder in it; files that have no name here are those being written."""
    if not isinstance(name, (str, os.PathLike)):
        return name is None
    path = Path(name).absolute()
    return path.is_relative_to(folder.absolute()) or folder.absolute().is_relative_to(path)
