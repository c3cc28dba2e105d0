"""What a run is asked for: a recipe, options over it, and what to do with an earlier run in its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.tokenizers import KINDS
from ..errors import UsageProblem, did_you_mean
from .recipe import RECIPE_FILE, Recipe, field_types, load_recipe

OPTIONS = {
    "family": "model.family",
    "checkpoint": "model.checkpoint",
    "size": "model.size",
    "tokenizer": "tokenizer.kind",
    "data": "data.source",
    "text_column": "data.text_column",
    "label_column": "data.label_column",
    "validation": "data.validation",
    "labels": "model.labels",
    "skip_bad_rows": "data.skip_bad_rows",
    "objective": "objective.name",
    "task": "objective.name",
    "method": "objective.name",
    "reward": "objective.reward",
    "lora": "lora.enabled",
    "merge": "lora.merge",
    "output": "training.output_dir",
}
"""Option of a command or function → the recipe key that it sets."""


Source = str | Path | Mapping[str, Any] | Recipe | None
"""A YAML file, its content as nested values, a recipe, or None for an empty one."""


@dataclass(frozen=True)
class Request:
    """What a run is asked for.

    Attributes:
        recipe: where it begins.
        flags: what overrides it: an option of `OPTIONS`, a section (`training={"max_steps": 10}`) or a dotted key, each
            with its value; None means not given.
        resume: go on from the last whole checkpoint in the output folder.
        overwrite: delete the earlier run in the output folder first.
        data_changed: go on although the data have changed; they begin with a new epoch. Data that only grew at the end
            need no leave: they enter with the next epoch.
        settings: `section.key=value`, over all of it.
        trust_remote_code: run Python code that a checkpoint carries. Granted here and nowhere else.
        dry_run: resolve, read and build everything, say what would be trained, and train and write nothing.
    """

    recipe: Source = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False
    overwrite: bool = False
    settings: Sequence[str] = ()
    trust_remote_code: bool = False
    data_changed: bool = False
    dry_run: bool = False

    @classmethod
    def of(
        cls,
        recipe: Source,
        *,
        resume: bool = False,
        overwrite: bool = False,
        settings: Sequence[str] = (),
        trust_remote_code: bool | None = None,
        data_changed: bool = False,
        dry_run: bool = False,
        **flags: Any,
    ) -> Request:
        """The request that a function's arguments make."""
        return cls(recipe, flags, resume, overwrite, settings, bool(trust_remote_code), data_changed, dry_run)

    def resolved(self) -> Recipe:
        """The recipe with everything over it; that of the run in the output folder, if it goes on and names no other.

        Raises:
            UsageProblem: what is wrong, naming file, key and value.
        """
        source, output = self.recipe, self.flags.get("output")
        if self.data_changed and not self.resume:
            raise UsageProblem("--data-changed is about a run that goes on: give --resume too")
        if self.resume and source is None and output is not None:
            source = Path(output) / RECIPE_FILE
        recipe = load_recipe(source, dict(recipe_keys(self.flags)), self.settings)
        recipe.model.trust_remote_code = self.trust_remote_code
        return recipe


def recipe_keys(flags: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The dotted recipe keys that options set, with their values; those that are None set nothing.

    Raises:
        UsageProblem: an unknown option, or a tokenizer that is neither a kind nor a folder.
    """
    sections = field_types(Recipe)
    for name, value in flags.items():
        if value is None:
            continue
        if name in sections and isinstance(value, Mapping):
            yield from ((f"{name}.{key}", item) for key, item in value.items())
        elif name == "tokenizer":
            yield tokenizer_key(str(value)), str(value)
        elif name in OPTIONS or "." in name:
            yield OPTIONS.get(name, name), value
        else:
            raise UsageProblem(f"unknown option {name!r}{did_you_mean(name, [*OPTIONS, *sections])}")


def tokenizer_key(tokenizer: str) -> str:
    """The recipe key that the option `tokenizer` sets: of a kind, or of the folder of a saved one.

    Raises:
        UsageProblem: it is neither.
    """
    if tokenizer in KINDS:
        return "tokenizer.kind"
    if not Path(tokenizer).is_dir():
        raise UsageProblem(
            f"--tokenizer {tokenizer!r} is neither a kind ({', '.join(KINDS)}) nor a folder"
            + did_you_mean(tokenizer, KINDS)
        )
    return "tokenizer.path"
