"""`hf-lnlm pretrain`, `finetune` and `align`: each is the package's function of that name."""

from __future__ import annotations

from typing import Any

import hf_lnlm

from ..flows.output import plain_when_piped


def train(command: str, **options: Any) -> None:
    """Run the command; the options are its own."""
    plain_when_piped()
    getattr(hf_lnlm, command)(**options)
