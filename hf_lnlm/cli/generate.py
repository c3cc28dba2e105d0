"""`hf-lnlm generate`: prompts continued, as text or JSON lines."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import UsageProblem, printable
from ..flows.console import json_text
from ..flows.generate import generate as continued
from ..flows.output import plain_when_piped


def generate(
    checkpoint: str, prompt: list[str] | None, sample: bool, beams: int, count: int, json: bool, **options: Any
) -> int:
    """Run the command; the arguments are its options. Returns the exit status."""
    plain_when_piped()
    drawn = {name: options.pop(name) for name in ("temperature", "top_k", "top_p")}
    if sample and drawn["temperature"] <= 0:
        raise UsageProblem(f"--temperature must be above 0, got {drawn['temperature']}; --greedy takes the best token")
    if not sample and beams == 1 and count > 1:
        raise UsageProblem("--count above 1 needs --sample or --beams: greedy continuations are all the same")
    if not sample and count > beams > 1:
        raise UsageProblem(f"--count must be at most --beams with --greedy, got {count} and {beams}")
    prompts = prompt or [_piped_prompt()]
    for text in prompts:
        if not _is_encodable(text):
            raise UsageProblem(f"a prompt must be UTF-8 text, got {text[:60]!r}")
    options |= {"do_sample": sample, "num_beams": beams, "num_return_sequences": count} | (drawn if sample else {})
    texts = continued(checkpoint, prompts, **options)
    for number, text in enumerate(texts):
        asked = prompts[number // count]
        if json:
            print(json_text({"prompt": asked, "text": text}))
        else:
            head = f"{'' if number == 0 else chr(10)}--- {asked!r}\n" if len(texts) > 1 else ""
            print(printable(f"{head}{text}"))
    return 0


def _piped_prompt() -> str:
    text = "" if sys.stdin.isatty() else sys.stdin.read().rstrip("\n")
    if not text:
        raise UsageProblem("no prompt: give --prompt TEXT (repeat for several), or pipe one in")
    return text


def _is_encodable(text: str) -> bool:
    """Whether it is Unicode text: bytes of a command line that aren't UTF-8 come as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
