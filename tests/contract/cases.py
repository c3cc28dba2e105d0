"""What the contract tests run on: every head of every family, tiny, with weights that are not blind.

All of it is derived from the registry, the configs' fields and the signatures of `forward`: a new row gets every test
that applies to it.

A fresh initialisation is nearly linear and nearly deaf to its input, which hides errors in masks and beam order. So
every weight gets N(0, 0.15) noise. Padding is an ordinary token: the mask alone must hide it.
"""

from __future__ import annotations

import dataclasses
import inspect
from functools import cache
from typing import Any

import pytest
import torch

from hf_lnlm.registry import FAMILIES, ROWS, Family, family, is_composed

PAD = 11
VOCABULARY = 61
NOISE = 0.15

# Small values by the common names of fields; a family maps its own names to these by `attribute_map`.
_TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "embedding_size": 12,
    "state_size": 8,
    "head_dim": 8,
    "time_step_rank": 4,
    "memory_size": 8,
    "num_memory_slots": 8,
    "memory_slots": 8,
    "memory_width": 6,
    "memory_dim": 6,
    "word_size": 6,
    "controller_size": 16,
    "projection_length": 8,
    "kernel_size": 3,
    "num_filters": 8,
    "filter_sizes": [2, 3],
    "num_labels": 3,
    "word_start_token_id": 20,
    "word_end_token_id": 13,
    "filler_token_id": 14,
    "target_vocab_size": 40,
}
_PER_TOKEN = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForPreTraining",
    "AutoModelForTokenClassification",
)
_CORE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One head of one family.

    Attributes:
        family: its row.
        auto: the Auto class that builds it.
        both_ways: whether the family's bidirectional fields are set.
    """

    family: Family
    auto: str
    both_ways: bool = False

    def __str__(self) -> str:
        way = "-both_ways" if self.both_ways else ""
        return f"{self.family.name}-{self.auto.removeprefix('AutoModel') or 'Model'}{way}"

    @property
    def cls(self) -> type:
        """The model class."""
        return self.family.model_class(self.auto)

    @property
    def causal(self) -> bool:
        """Whether it generates."""
        return self.auto == "AutoModelForCausalLM"

    @property
    def generates(self) -> bool:
        """Whether it has `generate`: a causal language model, or an encoder with a decoder."""
        return self.causal or self.auto == "AutoModelForSeq2SeqLM"

    @property
    def composed(self) -> bool:
        """Whether it is made of several models, each of which has losses of its own."""
        return is_composed(self.family.model_type)

    @property
    def per_token(self) -> bool:
        """Whether its first output has one vector a token."""
        return self.auto in _PER_TOKEN and not (self.auto == "AutoModelForPreTraining" and self.predicts_tokens)

    @property
    def predicts_tokens(self) -> bool:
        """Whether its model for pre-training is a language model, not a judge of tokens."""
        return bool(getattr(self.family.config_class, "predicts_both_ways", False))

    @property
    def has_loss(self) -> bool:
        """Whether it takes labels."""
        return self.auto != "AutoModel"

    @property
    def composite(self) -> bool:
        """Whether a model of another family, perhaps a stock one, is inside: then some rules are that model's."""
        return is_composite(self.family)

    def takes(self, name: str) -> bool:
        """Tell whether `forward` has a parameter."""
        return name in inspect.signature(self.cls.forward).parameters


def is_composite(row: Family) -> bool:
    """Tell whether a family's config holds another family's."""
    return bool(getattr(row.config_class, "sub_configs_defaults", None))


def cases(*, causal: bool = False, loss: bool = False, both_ways: bool = True, composed: bool = False) -> list[Case]:
    """Every head of every family, in both directions where it has them; if wanted, models made of several too."""
    found = []
    for row in ROWS if composed else FAMILIES:
        for auto in row.models:
            found.append(Case(row, auto))
            if both_ways and row.bidirectional and auto != "AutoModelForCausalLM":
                found.append(Case(row, auto, both_ways=True))
    return [c for c in found if (c.causal or not causal) and (c.has_loss or not loss)]


def one_case_a_family(*, causal: bool = False) -> list[Case]:
    """The head of each family that does most: the language model, else the first with a loss."""
    found = [max(rows, key=lambda c: (c.generates, c.has_loss)) for rows in _by_family(cases(both_ways=False))]
    return [c for c in found if c.causal or not causal]


def with_core(found: list[Case]) -> list[Any]:
    """The cases as a test's parameters; one a family is `core`, which is run on other versions of transformers too."""
    core = one_case_a_family()
    return [pytest.param(case, id=str(case), marks=[pytest.mark.core] if case in core else []) for case in found]


def _by_family(found: list[Case]) -> list[list[Case]]:
    return [[c for c in found if c.family is row] for row in FAMILIES]


@cache
def tiny_fields(model_type: str) -> dict[str, Any]:
    """Return tiny values for a family's fields; generic ones that it refuses are left at their defaults."""
    config_class = family(model_type).config_class
    common = {own: name for name, own in getattr(config_class, "attribute_map", {}).items()}
    names = {field.name for field in dataclasses.fields(config_class)} | set(common) | {"num_labels"}
    tiny = {n: _TINY[common.get(n, n)] for n in sorted(names) if common.get(n, n) in _TINY}
    scalars = {n: v for n, v in tiny.items() if not isinstance(v, list)}
    for attempt in (tiny, scalars):
        try:
            config_class(**attempt)
        except ValueError:
            continue
        return attempt
    return {n: v for n, v in scalars.items() if common.get(n, n) in _CORE or n == "num_labels"}


def tiny_config(case: Case, **fields: Any) -> Any:
    """Build a tiny config without dropout, so that what must be equal can be."""
    given = dict(tiny_fields(case.family.model_type))
    for name in given.keys() & _dropouts(case.family.model_type):
        given.pop(name)
    given |= dict.fromkeys(_dropouts(case.family.model_type), 0.0)
    if case.both_ways:
        given |= case.family.bidirectional or {}
    return case.family.config_class(**(given | fields))


@cache
def _dropouts(model_type: str) -> frozenset[str]:
    names = {field.name for field in dataclasses.fields(family(model_type).config_class)}
    return frozenset(n for n in names if "dropout" in n or n.endswith("_drop"))


def build(case: Case, seed: int = 1, **fields: Any) -> Any:
    """Build a tiny model in evaluation mode, with noise on every weight; ties stay."""
    torch.manual_seed(seed)
    model = case.cls(tiny_config(case, **fields)).eval()
    return add_noise(model, seed)


@torch.no_grad()
def add_noise(model: Any, seed: int) -> Any:
    """Move every floating-point parameter in place by N(0, 0.15)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype), alpha=NOISE)
    return model


def token_ids(batch: int, length: int, seed: int = 3) -> torch.Tensor:
    """Return ordinary token ids `(batch, length)`: no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(12, VOCABULARY, (batch, length), generator=generator)


def inputs_of(case: Case, batch: int = 2, length: int = 9, seed: int = 3) -> dict[str, torch.Tensor]:
    """Return input ids and mask as the head wants them; multiple choice has two choices a row."""
    if case.auto == "AutoModelForMultipleChoice":
        ids = token_ids(2 * batch, length, seed).view(batch, 2, length)
    else:
        ids = token_ids(batch, length, seed)
    if hasattr(case.family.config_class, "word_start_token_id"):
        ids = ids.where(ids % 3 > 0, _TINY["word_start_token_id"])  # words of about two characters
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if case.takes("decoder_input_ids"):
        inputs["decoder_input_ids"] = token_ids(batch, length, seed + 1)
    return inputs


def labels_of(case: Case, inputs: dict[str, torch.Tensor], seed: int = 5) -> dict[str, torch.Tensor]:
    """Return labels for a head; per-token ones are uneven: some rows have more ignored positions."""
    ids = inputs["input_ids"]
    generator = torch.Generator().manual_seed(seed)
    batch, length = ids.shape[0], ids.shape[-1]
    if case.auto == "AutoModelForQuestionAnswering":
        begin = torch.randint(0, length // 2, (batch,), generator=generator)
        return {"start_positions": begin, "end_positions": begin + 2}
    if case.auto in ("AutoModelForSequenceClassification", "AutoModelForMultipleChoice"):
        return {"labels": torch.arange(batch) % 2}
    if case.composed:
        return composed_labels(case, ids, generator)
    if case.auto == "AutoModelForTokenClassification":
        labels = torch.randint(0, 3, (batch, length), generator=generator)
    elif case.auto == "AutoModelForPreTraining" and not case.predicts_tokens:
        labels = torch.randint(0, 2, (batch, length), generator=generator)
    else:
        labels = ids.clone()
    if case.auto != "AutoModelForPreTraining" or case.predicts_tokens:
        for row in range(batch):
            labels[row, 1 : 1 + row % 5] = -100
    return {"labels": labels}


def composed_labels(case: Case, ids: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return labels for a model made of several: tokens to be found, and what else its terms need."""
    labels = ids.clone()
    for row in range(len(ids)):
        labels[row, 1 : 2 + row % 5] = -100
    if case.family.name == "sentence_pair":
        return {"labels": labels, "next_sentence_label": torch.arange(len(ids)) % 2}
    if case.family.name == "replaced_token":
        return {"labels": labels, "uniforms": torch.rand(ids.shape, generator=generator)}
    return {"labels": labels}


def rows_of(case: Case, count: int = 8, length: int = 8) -> list[dict[str, torch.Tensor]]:
    """Return a data set for Trainer, with labels."""
    batch = inputs_of(case, count, length, seed=20)
    batch |= labels_of(case, batch)
    return [{name: values[i] for name, values in batch.items()} for i in range(count)]


def first_output(model: Any, **inputs: Any) -> torch.Tensor:
    """Run without gradients and return logits or last hidden state."""
    with torch.no_grad():
        return main_output(model(**inputs))


def main_output(outputs: Any) -> torch.Tensor:
    """Return what a head is for: logits (both ends of an answer, stacked) or the last hidden state."""
    if getattr(outputs, "start_logits", None) is not None:
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)
    logits = outputs.get("logits", outputs.get("prediction_logits"))
    return outputs.last_hidden_state if logits is None else logits
