"""`hf-lnlm predict`: what a checkpoint says of each row of a file, as CSV or JSON lines."""

from __future__ import annotations

from typing import Any

from ..flows.output import plain_when_piped, say
from ..flows.predict import predict as predicted
from ..hub.folder import json_text


def predict(output: str | None, keep: list[str] | None, **options: Any) -> int:
    """Run the command; the arguments are its options. Returns the exit status."""
    plain_when_piped()
    found = predicted(output=output, keep=keep or (), **options)
    if output is None:
        for answer in found:
            print(json_text(answer))
    else:
        say(f"{output}: {len(found):,} rows")
    return 0
