"""Translation by any encoder-decoder, ours or stock: texts in, what they become out, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageProblem
from ..hub.folder import write_text
from .models import load_config
from .predict import ENDINGS, loaded_asker, predict, prediction_recipe
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
    _check_translates(checkpoint, trust_remote_code)
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


def _check_translates(checkpoint: str | Path, trust: bool | None) -> None:
    """Refuse a model that has no encoder with a decoder, before its weights are loaded."""
    config = load_config(ModelSection(checkpoint=str(checkpoint), trust_remote_code=bool(trust)))
    if not getattr(config, "is_encoder_decoder", False):
        raise UsageProblem(f"{checkpoint} is a {config.model_type}, which has no encoder with a decoder: try generate")


@dataclass(frozen=True)
class Alignment:
    """Where a decoder looked in its source while it wrote.

    Attributes:
        source: its tokens.
        target: tokens that were written.
        weights: `(target, source)`, nested lists; row t is how much was looked where to write token t.
    """

    source: list[str]
    target: list[str]
    weights: list[list[float]]


def alignment(
    checkpoint: str | Path,
    text: str,
    *,
    target: str | None = None,
    layer: int | None = None,
    beams: int = 4,
    max_new_tokens: int = 128,
    prefix: str | None = None,
    trust_remote_code: bool | None = None,
) -> Alignment:
    """Tell where an encoder-decoder looks in a text while it translates it.

    Args:
        checkpoint: folder or Hub repository of an encoder-decoder, ours or stock.
        text: what is translated.
        target: what is written; None for what the model writes itself.
        layer: of the decoder, from 0; the last if None. Several heads are averaged.
        beams, max_new_tokens, prefix, trust_remote_code: as in `translate`.

    Raises:
        ValueError: the checkpoint is no encoder-decoder, has no attention or no such layer, or a text has no token.
    """
    import torch

    _check_translates(checkpoint, trust_remote_code)
    options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": max_new_tokens}
    if prefix is not None:
        options["prefix"] = prefix
    options = {"objective": options, "task": "text_to_text"}
    recipe = prediction_recipe(str(checkpoint), [text], (), bool(trust_remote_code), options)
    asker = loaded_asker(recipe, False)
    model, tokenizer = asker.model, asker.tokenizer
    (item,) = asker.items([asker.read({recipe.data.source_column: text})])
    inputs = torch.tensor([item.content["input_ids"]], device=model.device)
    given = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    if target is None:
        written = model.generate(**given, do_sample=False, num_beams=beams, max_new_tokens=max_new_tokens)
    else:
        ids = tokenizer(text_target=target)["input_ids"]
        end = [] if tokenizer.eos_token_id in (None, *ids[-1:]) else [tokenizer.eos_token_id]
        if not ids:
            raise UsageProblem(f"--target must have a token, got {target!r}")
        written = torch.tensor([[model.config.decoder_start_token_id, *ids, *end]], device=model.device)
    if hasattr(model, "set_attn_implementation") and model._supports_sdpa:
        model.set_attn_implementation("eager")  # the fused kernels give no weights
    with torch.no_grad():
        outputs = model(**given, decoder_input_ids=written[:, :-1], output_attentions=True, use_cache=False)
    looked = outputs.cross_attentions
    if not looked or any(weights is None for weights in looked):
        raise UsageProblem(f"{checkpoint} has no attention over its source to be drawn")
    if layer is not None and not 0 <= layer < len(looked):
        raise UsageProblem(f"--layer must lie between 0 and {len(looked) - 1}, got {layer}")
    weights = looked[-1 if layer is None else layer][0].float().mean(0)
    read, wrote = inputs[0].tolist(), written[0, 1:].tolist()
    source, said = ([_shown(tokenizer, token) for token in ids] for ids in (read, wrote))
    return Alignment(source, said, weights.tolist())


def _shown(tokenizer: Any, token: int) -> str:
    """A token as it reads, or its name where that says nothing."""
    text = tokenizer.decode([token]).strip()
    return text if text.isprintable() and text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))
