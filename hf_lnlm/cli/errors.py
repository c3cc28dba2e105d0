"""What the command line says when something is wrong: one clear line, and an exit status a script can rely on."""

from __future__ import annotations

import os
import sys
import traceback

from ..errors import UsageProblem, printable

USAGE_STATUS = 2
FAILURE_STATUS = 1
INTERRUPT_STATUS = 130


_SELF_EXPLAINING = (ValueError, OSError, ImportError, RuntimeError)


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, led by its type when the message alone would not explain itself."""
    text = printable(" ".join(str(error).split()))
    if isinstance(error, UsageProblem):
        return text
    if isinstance(error, RecursionError):
        return "something is nested too deeply"
    if isinstance(error, MemoryError):
        return f"not enough memory{': ' if text else ''}{text}"
    if isinstance(error, UnicodeError):
        return f"text that can't be read or written in this encoding: {text}"
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"no such file or folder: {printable(error.filename)}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {printable(error.filename)}"
    if isinstance(error, _SELF_EXPLAINING):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def report(error: BaseException, show_traceback: bool) -> int:
    """Print `error` on stderr and return the exit status that goes with it.

    Args:
        error: what stopped the command.
        show_traceback: also print where it happened (`--debug`).
    """
    if show_traceback:
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPT_STATUS
    hint = "" if show_traceback or _is_ours(error) else "  [--debug shows where]"
    print(f"error: {one_line(error)}{hint}", file=sys.stderr)
    return USAGE_STATUS if isinstance(error, (ValueError, FileNotFoundError)) else FAILURE_STATUS


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised `error` itself, so that the message is meant for the user."""
    frames = list(traceback.walk_tb(error.__traceback__))
    module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return module.split(".")[0] == __package__.split(".")[0]
