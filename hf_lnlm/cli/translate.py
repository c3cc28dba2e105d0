"""`hf-lnlm translate`: texts of the command line, of a file or piped in, and what they become."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import UsageProblem, printable
from ..flows.output import plain_when_piped, say
from ..flows.translate import translate as translated


def translate(text: list[str] | None, data: str | None, output: str | None, **options: Any) -> int:
    """Run the command; the arguments are its options. Returns the exit status."""
    plain_when_piped()
    if text and data is not None:
        raise UsageProblem("give texts or --data FILE, not both")
    if not text and data is None and not sys.stdin.isatty():
        text = sys.stdin.read().splitlines()
    found = translated(texts=data if data is not None else text, output=output, **options)
    if output is None:
        for line in found:
            print(printable(line))
    else:
        say(f"{output}: {len(found):,} translations")
    return 0
