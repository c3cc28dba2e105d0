"""`hf-lnlm convert`: checkpoints of other projects, in and out."""

from __future__ import annotations

from typing import Any

from ..flows.convert import convert as converted
from ..flows.output import plain_when_piped, say


def convert(source: str, output: str, settings: list[str], **options: Any) -> int:
    """Run the command; the arguments are its options. Returns the exit status."""
    plain_when_piped()
    folder = converted(source, output, fields=settings, **options)
    say(f"saved to {folder}")
    return 0
