"""`hf-lnlm generate`: continue prompts with a checkpoint, several as one left-padded batch."""

from __future__ import annotations

import json as json_module
import sys
from typing import Any

from .errors import UsageProblem
from .models import load_config, load_model, load_tokenizer
from .output import plain_when_piped
from .recipe import ModelSection

_HEADS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


def generate(
    checkpoint: str,
    prompt: list[str] | None,
    max_new_tokens: int,
    sample: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    beams: int,
    count: int,
    seed: int,
    json: bool,
    trust_remote_code: bool,
) -> int:
    """Run the command; the arguments are its options. Returns the exit status."""
    from transformers import set_seed

    plain_when_piped()
    if sample and temperature <= 0:
        raise UsageProblem(f"--temperature must be above 0, got {temperature}; --greedy takes the best token")
    if not sample and beams == 1 and count > 1:
        raise UsageProblem("--count above 1 needs --sample or --beams: greedy continuations are all the same")
    if not sample and count > beams > 1:
        raise UsageProblem(f"--count must be at most --beams with --greedy, got {count} and {beams}")
    prompts = prompt or [_piped_prompt()]
    section = ModelSection(checkpoint=checkpoint, trust_remote_code=trust_remote_code)
    model, tokenizer = load_generator(section)
    set_seed(seed)
    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if sample else {}
    options = {"max_new_tokens": max_new_tokens, "do_sample": sample, "num_beams": beams} | drawn
    texts = continuations(model, tokenizer, prompts, num_return_sequences=count, **options)
    for number, text in enumerate(texts):
        asked = prompts[number // count]
        if json:
            print(json_module.dumps({"prompt": asked, "text": text}, ensure_ascii=False))
        else:
            print(f"{'' if number == 0 else chr(10)}--- {asked!r}\n{text}" if len(texts) > 1 else text)
    return 0


def _piped_prompt() -> str:
    if sys.stdin.isatty():
        raise UsageProblem("no prompt: give --prompt TEXT (repeat for several), or pipe one in")
    text = sys.stdin.read().rstrip("\n")
    if not text:
        raise UsageProblem("no prompt: give --prompt TEXT (repeat for several), or pipe one in")
    return text


def load_generator(section: ModelSection) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint that writes text.

    Raises:
        UsageProblem: it has no head that writes.
    """
    from ..objectives.families import has_head

    config = load_config(section)
    architectures = getattr(config, "architectures", None) or []
    auto = next((name for name in _HEADS if has_head(config, name)), None)
    writes = any("CausalLM" in name or "LMHead" in name or "ConditionalGeneration" in name for name in architectures)
    if auto is None or (not writes and architectures):
        raise UsageProblem(f"{section.checkpoint} holds {', '.join(architectures)}, which doesn't write text")
    model = load_model(section, auto).eval()
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
