"""A Hub that doesn't answer: every try ends after thirty seconds, and says so at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UsageProblem

TRY_SECONDS = 30.0


class NoAnswer(UsageProblem, OSError):
    """The Hub didn't answer in time; the message is one line for the user."""


def lost_connection(error: Exception) -> bool:
    """Whether no answer came. huggingface_hub's HTTP library has changed its name; its base class hasn't."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    return isinstance(error, ConnectionError) or any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def tell(text: str) -> None:
    """Print a line on stderr at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextmanager
def bounded() -> Iterator[Any]:
    """Let every wait for the Hub in the block end after `TRY_SECONDS`; huggingface_hub itself sets no limit.

    Yields:
        the session that huggingface_hub's calls share.
    """
    from huggingface_hub.utils import get_session

    session = get_session()
    before, session.timeout = session.timeout, TRY_SECONDS
    try:
        yield session
    finally:
        session.timeout = before


def knock(name: str, endpoint: str | None = None) -> None:
    """Make sure that the Hub answers, before something is loaded from it file by file, each with tries of its own.

    Where it doesn't, what its cache holds of `name` is used for the rest of the process; in offline mode nothing is asked.

    Args:
        name: of a repository, for the message.
        endpoint: address of the Hub; None uses HF_ENDPOINT or the public one.

    Raises:
        NoAnswer: it doesn't answer, and the cache holds nothing of `name`.
    """
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    if constants.HF_HUB_OFFLINE:
        return
    address, began = endpoint or constants.ENDPOINT, time.monotonic()
    try:
        with bounded() as session:
            session.head(address)
    except Exception as error:
        if not lost_connection(error):
            raise
        problem = f"{address} doesn't answer (gave up after {time.monotonic() - began:.0f} s: {type(error).__name__})"
        try:
            cached = any(repo.repo_id == name for repo in scan_cache_dir().repos)
        except CacheNotFound:
            cached = False
        if not cached:
            raise NoAnswer(f"{name}: it is no folder here, and {problem}") from None
        tell(f"warning: {problem}; {name} is taken from the cache")
        constants.HF_HUB_OFFLINE = True
