"""Translation by any encoder-decoder, ours or stock: texts in, what they become out, in order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageProblem
from ..hub.folder import write_text
from .models import load_config
from .predict import ENDINGS, predict
from .recipe import ModelSection


def translate(
    checkpoint: str | Path,
    texts: Sequence[str] | str | Path | None = None,
    *,
    output: str | Path | None = None,
    beams: int = 4,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    prefix: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool | None = None,
    **overrides: Any,
) -> list[str]:
    """Translate texts, or rewrite them in whatever way the checkpoint has learnt.

    Args:
        checkpoint: folder or Hub repository of an encoder-decoder: ours, T5, Marian, BART …
        texts: a list of texts; or a file of rows, of which the column `source` or else `text` is read, or of lines.
        output: a file for the translations, one a line; or `.csv` or `.jsonl`, as `predict` writes them.
        beams: of beam search, 1 for greedy.
        max_new_tokens: most tokens of a translation.
        batch_size: texts of a batch; those of like length go together.
        prefix: put before every text, as T5 tells tasks apart; default: what the checkpoint was fine-tuned with.
        overwrite: write over an output that is there.
        trust_remote_code: run Python code that the checkpoint carries.
        overrides: as in `predict`: `source_column`, `skip_bad_rows`, `text_column` …

    Returns:
        Translations in the order of the texts.

    Raises:
        ValueError: the checkpoint is no encoder-decoder, there is nothing to translate, or the output is in the way.
    """
    if texts is None or (isinstance(texts, (list, tuple)) and not texts):
        raise UsageProblem("there is nothing to translate: give texts, or --data FILE")
    config = load_config(ModelSection(checkpoint=str(checkpoint), trust_remote_code=bool(trust_remote_code)))
    if not getattr(config, "is_encoder_decoder", False):
        raise UsageProblem(f"{checkpoint} is a {config.model_type}, which has no encoder with a decoder: try generate")
    target = None if output is None else Path(output)
    rows = target is not None and target.suffix in ENDINGS
    if target is not None and not rows:
        _check_lines(target, overwrite)
    options: dict[str, Any] = {"objective": {"num_beams": beams, "max_new_tokens": max_new_tokens}}
    if prefix is not None:
        options["objective"]["prefix"] = prefix
    options["training"] = {"per_device_eval_batch_size": batch_size}
    options |= {"task": "text_to_text", "trust_remote_code": trust_remote_code, "overwrite": rows and overwrite}
    answers = predict(checkpoint, texts, output=target if rows else None, **options, **overrides)
    found = [str(answer["text"]) for answer in answers]
    if target is not None and not rows:
        write_text(target, "".join(" ".join(text.splitlines()) + "\n" for text in found))
    return found


def _check_lines(target: Path, overwrite: bool) -> None:
    """Refuse a file for translations that can't or must not be written, before anything is loaded."""
    if target.is_dir() or not target.parent.is_dir():
        raise UsageProblem(f"--output names a file in a folder that exists, got {str(target)!r}")
    if target.exists() and not overwrite:
        raise UsageProblem(f"{target} is there already: --overwrite writes over it, --output elsewhere")
