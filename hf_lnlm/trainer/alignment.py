"""Learning from preferences with TRL: which of its trainers does what, and what a model must be for them to be right.

TRL computes log-probabilities from a model's last hidden states and the weight of its output layer, without calling the
model's own head, and packs documents into one flat row. Both are exact only for models that fit; `check_model` and
`check_packing` measure it on a few tokens and refuse the others, instead of training on something else.
TRL 1.16 has no PPO; the on-policy methods are GRPO and RLOO.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .randomness import evaluating
from .resumed import ResumedRun

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Method:
    """One of TRL's trainers.

    Attributes:
        name: as in recipes.
        title: what it learns, in words.
        paper: where it is from.
        trainer: TRL's class; its config is named alike.
        auto_class: the Auto class of the model that it trains.
        columns: of a training row.
        rewarded: whether completions are drawn while training and rated by a reward.
    """

    name: str
    title: str
    paper: str
    trainer: str
    auto_class: str
    columns: tuple[str, ...]
    rewarded: bool = False

    def classes(self) -> tuple[type, type]:
        """TRL's trainer and config.

        Raises:
            ImportError: TRL is not installed; names the extra.
        """
        try:
            trl = importlib.import_module("trl")
        except ModuleNotFoundError as error:
            raise ImportError("preference training needs TRL: pip install 'hf_lnlm[rlhf]'") from error
        return getattr(trl, self.trainer), getattr(trl, self.trainer.replace("Trainer", "Config"))


_LM = "AutoModelForCausalLM"
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("sft", "Answers to prompts", "Ouyang et al. 2022", "SFTTrainer", _LM, ("prompt", "completion")),
        Method(
            "reward",
            "A score for an answer",
            "Bradley and Terry 1952; Ouyang et al. 2022",
            "RewardTrainer",
            "AutoModelForSequenceClassification",
            ("prompt", "chosen", "rejected"),
        ),
        Method("dpo", "The better of two", "Rafailov et al. 2023", "DPOTrainer", _LM, ("prompt", "chosen", "rejected")),
        Method("kto", "Good or bad", "Ethayarajh et al. 2024", "KTOTrainer", _LM, ("prompt", "completion", "label")),
        Method("grpo", "What a reward favours", "Shao et al. 2024", "GRPOTrainer", _LM, ("prompt",), rewarded=True),
        Method("rloo", "What a reward favours", "Ahmadian et al. 2024", "RLOOTrainer", _LM, ("prompt",), rewarded=True),
    )
}
"""Name → TRL's method."""


def rows_for(method: Method, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Preference rows as a method wants them.

    Args:
        method: which.
        rows: with `prompt`, `chosen` and `rejected`, or already with the method's own columns.

    Raises:
        ValueError: a row has neither; names the columns it has.
    """
    made: list[dict[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        if set(method.columns) <= set(row):
            made.append({name: row[name] for name in method.columns})
        elif {"prompt", "chosen", "rejected"} <= set(row):
            made += _from_preferences(method, row)
        else:
            wanted = ", ".join(method.columns)
            raise ValueError(f"row {number}: {method.name} wants {wanted} (or prompt, chosen, rejected), got {[*row]}")
    return made


def _from_preferences(method: Method, row: dict[str, Any]) -> list[dict[str, Any]]:
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if method.name == "kto":
        pairs = ((chosen, True), (rejected, False))
        return [{"prompt": prompt, "completion": text, "label": good} for text, good in pairs]
    return [{"prompt": prompt, "completion": chosen}] if method.name == "sft" else [{"prompt": prompt}]


def check_model(model: Any) -> None:
    """Refuse a language model whose log-probabilities TRL would compute wrongly.

    Raises:
        ValueError: says why and what to change.
    """
    head = model.get_output_embeddings()
    name, config = type(model).__name__, model.config
    if head is None:
        raise ValueError(
            f"TRL needs an output layer with one weight, and {name} has none (loss_head="
            f"{getattr(config, 'loss_head', None)!r}): build it with loss_head='full' or 'chunked'"
        )
    ids = _sample(config)
    with evaluating(model):
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        fits = hidden.shape[-1] == head.weight.shape[-1]
        if fits and torch.allclose(torch.nn.functional.linear(hidden, head.weight, head.bias), logits, atol=TOLERANCE):
            return
    raise ValueError(
        f"TRL multiplies the last hidden state with the output layer's weight, and {name} does more than that (a "
        "projection between the two): train it with embedding_size=hidden_size, or with tie_word_embeddings=false"
    )


def check_packing(model: Any) -> None:
    """Refuse packed rows for a model that would carry something from one document into the next.

    Raises:
        ValueError: the second of two packed documents gets other logits than alone.
    """
    first, second = _sample(model.config), _sample(model.config, 7)
    lengths = torch.tensor([0, first.shape[1], first.shape[1] + second.shape[1]], dtype=torch.int32)
    packed = {
        "input_ids": torch.cat([first, second], 1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths.diff().tolist()])[None],
        "seq_idx": torch.repeat_interleave(torch.arange(2, dtype=torch.int32), lengths.diff())[None],
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": int(lengths.diff().max()),
        "max_length_k": int(lengths.diff().max()),
    }
    try:
        with evaluating(model):
            together = model(**packed, use_cache=False).logits[:, first.shape[1] :]
            alone = model(input_ids=second, use_cache=False).logits
        leak = float((together - alone).abs().max())
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{model.config.model_type} can't read packed rows ({error}): set packing=false") from None
    if leak > TOLERANCE:
        raise ValueError(
            f"packed rows would leak from one document into the next in {model.config.model_type} (logits differ by "
            f"{leak:.2g}): set packing=false and padding_free=false"
        )


def _sample(config: Any, shift: int = 0) -> torch.Tensor:
    """A few token ids `(1, 8 + shift)` that any vocabulary has."""
    return (torch.arange(8 + shift)[None] * 5 + 3 + shift) % config.vocab_size


def prepared_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer as TRL needs it: it writes the end token as text, and that must be read as the token.

    Raises:
        ValueError: the tokenizer has no end or no padding token.
    """
    tokenizer.split_special_tokens = False
    for name in ("eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"preference training needs a tokenizer with {name}, got none")
    return tokenizer


def preference_trainer(
    method: Method,
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    arguments: dict[str, Any],
    held: Sequence[dict[str, Any]] | None = None,
    reward: Callable[..., list[float]] | str | None = None,
    peft_config: Any = None,
) -> Any:
    """One of TRL's trainers for a model of ours or a stock one, checked for what would go wrong silently.

    Args:
        method: which.
        model: loaded from a folder or the Hub: TRL builds the reference model from the same place.
        tokenizer: the model's.
        rows: preference rows, or rows with the method's own columns.
        arguments: fields of TRL's config.
        held: rows to evaluate on.
        reward: for methods that draw completions: a function of them, or the folder of a reward model.
        peft_config: trains adapters instead of the model.

    Raises:
        ValueError: the model doesn't fit TRL's way of computing, a reward is missing, or rows lack columns.
    """
    from datasets import Dataset

    trainer_class, config_class = method.classes()
    if method.rewarded and reward is None:
        raise ValueError(f"{method.name} needs a reward: a function's name, or the folder of a reward model")
    if method.auto_class == _LM:
        check_model(model)
    packs = arguments.get("packing") or arguments.get("eval_packing")
    if method.name == "sft" and packs and arguments.get("packing_strategy") == "wrapped":
        raise ValueError("packing_strategy=wrapped joins texts without marking their borders: use bfd or bfd_split")
    if method.name == "sft" and (packs or arguments.get("padding_free")):
        check_packing(model)
    elif arguments.get("padding_free"):
        raise ValueError(f"TRL's {method.name} pads whatever padding_free says: leave it out")
    config = config_class(**{"report_to": "none", "bf16": False} | arguments)
    made = [None if part is None else Dataset.from_list(rows_for(method, part)) for part in (rows, held)]
    extra = {"reward_funcs": reward} if method.rewarded else {}
    resumable = type(trainer_class.__name__, (ResumedRun, trainer_class), {})
    with _auto_map_of(type(model.config)):
        trainer = resumable(
            model=model,
            args=config,
            train_dataset=made[0],
            eval_dataset=made[1],
            processing_class=prepared_tokenizer(tokenizer),
            peft_config=peft_config,
            **extra,
        )
    trainer.create_model_card = _no_card  # with every checkpoint, in the place of the run's own
    return trainer


def _no_card(*args: Any, **kwargs: Any) -> None:
    """TRL's model card, left out."""


@contextmanager
def _auto_map_of(config_class: type) -> Iterator[None]:
    """An empty `auto_map` on a config class: TRL asks every config without a stock architecture for it."""
    lacking = not hasattr(config_class, "auto_map")
    if lacking:
        config_class.auto_map = {}  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if lacking:
            del config_class.auto_map  # type: ignore[attr-defined]
