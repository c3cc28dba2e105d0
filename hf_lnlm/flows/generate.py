"""Generation: continue prompts with a checkpoint, several as one left-padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageProblem
from .models import load_config, load_tokenizer, load_trained
from .recipe import ModelSection

_HEADS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


def generate(
    checkpoint: str | Path,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    trust_remote_code: bool = False,
    allow_new_weights: bool = False,
    **options: Any,
) -> list[str]:
    """Continue prompts with a checkpoint; several run as one left-padded batch.

    Args:
        checkpoint: folder or Hub repository.
        prompts: texts to continue.
        seed: of the draws.
        trust_remote_code: run Python code that the checkpoint carries.
        allow_new_weights: draw a head at random where the checkpoint has none.
        options: of transformers' `generate`: `max_new_tokens`, `do_sample`, `num_return_sequences` …

    Returns:
        Texts, each prompt's together, prompt included (an encoder-decoder's: the answer only).

    Raises:
        ValueError: the checkpoint can't be loaded or doesn't write text.
    """
    from transformers import set_seed

    section = ModelSection(checkpoint=str(checkpoint), trust_remote_code=trust_remote_code)
    model, tokenizer = load_generator(section, allow_new_weights)
    set_seed(seed)
    return continuations(model, tokenizer, list(prompts), **options)


def load_generator(section: ModelSection, allow_new_weights: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint that writes text.

    Raises:
        UsageProblem: it has no head that writes.
    """
    from ..objectives.families import has_head

    config = load_config(section)
    architectures = getattr(config, "architectures", None) or []
    auto = next((name for name in _HEADS if has_head(config, name)), None)
    writes = any("CausalLM" in name or "LMHead" in name or "ConditionalGeneration" in name for name in architectures)
    if auto is None or (not writes and architectures and not allow_new_weights):
        raise UsageProblem(f"{section.checkpoint} holds {', '.join(architectures)}, which doesn't write text")
    model = load_trained(section, auto, allow_new_weights).eval()
    return model, load_tokenizer(str(section.checkpoint), section)


def continuations(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> list[str]:
    """Texts that continue `prompts`, each prompt's together, prompt included (an encoder-decoder's: target only).

    Args:
        model: has `generate`.
        tokenizer: pads on the left where the model continues its input.
        prompts: several are padded to one batch.
        options: of `generate`.
    """
    import torch

    answers = bool(getattr(model.config, "is_encoder_decoder", False))
    tokenizer.padding_side = "right" if answers else "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1)
    if batch["input_ids"].shape[1] == 0:
        batch = _opening(tokenizer, len(prompts))
    inputs = {name: batch[name].long() for name in ("input_ids", "attention_mask")}
    _check_ids(inputs["input_ids"], model, tokenizer)
    with torch.no_grad():
        ids = model.generate(**inputs, pad_token_id=tokenizer.pad_token_id, **options)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def _opening(tokenizer: Any, rows: int) -> dict[str, Any]:
    """A batch that holds the token that opens a text, for empty prompts."""
    import torch

    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise UsageProblem("the prompt is empty, and the tokenizer has no token that opens a text")
    ids = torch.full((rows, 1), first)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _check_ids(ids: Any, model: Any, tokenizer: Any) -> None:
    from ..data.tokenizers import check_token_ids

    check_token_ids(ids, model.config.vocab_size)
