"""Every key that a recipe takes, with type, default and meaning: what `--set KEY=VALUE` can set."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import UsageProblem, did_you_mean
from ..objectives import OBJECTIVES
from ..tasks import TASKS
from .recipe import Recipe, field_types

MEANINGS = {
    "model.family": "a row of `hf-lnlm list` or a model type of transformers, for a model from scratch",
    "model.size": "what sets every size that is not given: tiny, small or base",
    "model.config": "fields of the family's config: model.config.hidden_size=64",
    "model.checkpoint": "folder or Hub name to go on from, instead of a family",
    "model.head": "a family of ours that takes the checkpoint as its encoder",
    "model.revision": "branch, tag or commit of a checkpoint on the Hub",
    "model.labels": "the classes in order; no others are taken",
    "tokenizer.kind": "what is built from the training text: bpe, byte, char, word or protein",
    "tokenizer.vocab_size": "most tokens of a vocabulary that is learnt",
    "tokenizer.template": "special tokens around a text: bert, roberta or t5; by the model unless given",
    "tokenizer.path": "folder of a saved tokenizer, instead of a new one",
    "data.source": "file, glob, folder, dataset's name, `stdlib`, or `synthetic:NAME`",
    "data.text_column": "column of the text",
    "data.validation": "share to hold out, or another source; 0 for none",
    "data.unit": "what one document of a text file is",
    "data.streaming": "read as it goes instead of caching",
    "data.encoding": "of text files",
    "data.errors": "what bytes do that the encoding doesn't know",
    "data.mode": "packed blocks, or contiguous streams (lanes) for models that carry state",
    "data.frame": "which end tokens go around a document",
    "data.block_size": "tokens of a row; longer rows with labels are cut",
    "data.limit": "most documents or rows",
    "data.label_column": "column of the class, number or right choice",
    "data.pair_column": "column of the second text of a pair",
    "data.tokens_column": "column of a sentence's words",
    "data.tags_column": "column of their tags",
    "data.source_column": "column of the text that is to be rewritten",
    "data.target_column": "column of what it becomes",
    "data.question_column": "column of the question",
    "data.context_column": "column of the text that answers, or that choices go on from",
    "data.answers_column": "column of the answers",
    "data.choices_column": "column of the choices",
    "data.quoted": "whether fields in quotes may hold separators; CSV yes, TSV no unless given",
    "data.skip_bad_rows": "leave out rows that can't be read, and say which",
    "objective.name": "an objective or task of `hf-lnlm list`",
    "lora.enabled": "train low-rank adapters only",
    "lora.r": "their rank",
    "lora.alpha": "their scale; twice the rank unless given",
    "lora.dropout": "in front of adapters",
    "lora.embeddings": "adapt tables of embeddings too",
    "lora.targets": "modules to adapt; every weight matrix unless given",
    "lora.target_parameters": "raw parameters to adapt",
    "lora.modules_to_save": "modules that are trained in full beside them",
    "lora.merge": "also save the model with its adapter merged",
    "hub.repo_id": "owner/name on the Hub",
    "hub.private": "whether a new repository is private",
    "hub.push": "publish when the run ends",
    "hub.license": "identifier of the weights' licence for the card; none is named unless given",
}
"""Key → meaning, for the sections that are ours alone; objectives' options say theirs in their docstrings."""
_ARGUMENTS = re.compile(r"\n    (?:Args|Attributes):\n(.*?)(?:\n    \w|\Z)", re.DOTALL)
_ARGUMENT = re.compile(r"^        ([\w, ]+): (.*?)(?=^        \w[\w, ]*: |\Z)", re.MULTILINE | re.DOTALL)
UNSAID = ("model.trust_remote_code", "objective.options")
"""Fields that no recipe holds."""


class Key(NamedTuple):
    """A key of a recipe: dotted name, type, default, what it means, and whose option it is (objectives and tasks)."""

    name: str
    type: str
    default: str
    meaning: str
    of: str = ""


def recipe_keys_starting(prefix: str = "") -> list[Key]:
    """All keys that begin so, in the order of the sections.

    Args:
        prefix: `data`, `training.l` …; `objective.masked` gives the options of that objective.

    Raises:
        UsageProblem: there is none; names the closest.

    >>> recipe_keys_starting("data.limit")
    [Key(name='data.limit', type='int | None', default='', meaning='most documents or rows', of='')]
    """
    keys = list(_all_keys())
    found = [key for key in keys if key.name.startswith(prefix) or f"objective.{key.of}." == f"{prefix}."]
    if not found:
        raise UsageProblem(f"no key begins with {prefix!r}{did_you_mean(prefix, [key.name for key in keys])}")
    return found


def _all_keys() -> Iterator[Key]:
    from ..trainer.arguments import LNLMTrainingArguments

    for section in ("model", "tokenizer", "data", "objective", "lora", "hub"):
        kind = field_types(Recipe)[section]
        yield from _of_class(kind, section, MEANINGS)
    for name, kind in {**OBJECTIVES, **TASKS}.items():
        yield from _of_class(kind, "objective", {}, name)
    helps = {f"training.{item.name}": str(item.metadata.get("help", "")) for item in _fields(LNLMTrainingArguments)}
    yield from _of_class(LNLMTrainingArguments, "training", helps)


def _fields(kind: Any) -> list[Any]:
    return [item for item in dataclasses.fields(kind) if item.init]


def _of_class(kind: Any, section: str, meanings: Mapping[str, str], of: str = "") -> Iterator[Key]:
    said = _argument_texts(kind) if not meanings else {}
    for item in _fields(kind):
        name = f"{section}.{item.name}"
        if name not in UNSAID:
            text = " ".join((meanings.get(name) or said.get(item.name, "")).split())
            yield Key(name, str(item.type).replace("typing.", ""), _default(item), text, of)


def _default(item: Any) -> str:
    if item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
        return "" if value in ({}, []) else str(value)
    if item.default is None or item.default is dataclasses.MISSING:
        return ""
    return str(getattr(item.default, "value", item.default))


def _argument_texts(kind: Any) -> dict[str, str]:
    """What the docstrings of a class and its bases say of their arguments, by name."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        part = _ARGUMENTS.search(base.__doc__ or "")
        for names, text in _ARGUMENT.findall(part[1] if part else ""):
            found |= dict.fromkeys((name.strip() for name in names.split(",")), text)
    return found
