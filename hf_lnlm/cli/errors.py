"""What the command line says when something is wrong: one clear line, and an exit status a script can rely on."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Iterable

USAGE_STATUS = 2
FAILURE_STATUS = 1
INTERRUPT_STATUS = 130


class UsageProblem(ValueError):
    """The request itself is wrong (a flag, a recipe key, an output folder in use); the exit status is 2."""


class RunFailed(RuntimeError):
    """The request was fine but can't be carried out (no network, no permission, a failed check); exit status 1."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest of `known`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown_name(what: str, name: str, known: Iterable[str]) -> UsageProblem:
    """The error for a name that is not in a table: what it is, what was given, the closest match and all choices."""
    names = list(known)
    return UsageProblem(f"unknown {what} {name!r}{did_you_mean(name, names)}; choose from: {', '.join(names)}")


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, led by its type when the message alone would not explain itself."""
    text = " ".join(str(error).split())
    if isinstance(error, (UsageProblem, RunFailed)):
        return text
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"no such file or folder: {error.filename}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return text or type(error).__name__


def report(error: BaseException, show_traceback: bool) -> int:
    """Print `error` on stderr and return the exit status that goes with it.

    Args:
        error: what stopped the command.
        show_traceback: also print where it happened (`--traceback`).
    """
    if show_traceback:
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPT_STATUS
    hint = "" if show_traceback or _is_ours(error) else "  [--traceback shows where]"
    print(f"error: {one_line(error)}{hint}", file=sys.stderr)
    return USAGE_STATUS if isinstance(error, (ValueError, FileNotFoundError)) else FAILURE_STATUS


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised `error` itself, so that the message is meant for the user."""
    frames = list(traceback.walk_tb(error.__traceback__))
    module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return module.split(".")[0] == __package__.split(".")[0]
