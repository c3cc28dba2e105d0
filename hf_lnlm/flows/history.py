"""What a run's weights were trained with, kept beside its checkpoints; and what may change when the run goes on.

The record has a part for each stretch of steps that was trained alike: where it began, the versions, processes and
schedule, the tokenizer's and the base's digest, labels, objective and seed, and fingerprints of the data. Going on with
other data, or by other arguments than those of `FREE`, is refused by name: an optimizer that is read back has its own.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..data.fingerprint import Comparison, Fingerprint, compare, file_print
from ..data.readers import expand
from ..errors import UsageProblem
from ..hub.folder import BadFile, read_json, write_text
from .documents import source_name, world_size
from .output import warn
from .recipe import RECIPE_FILE, Recipe, plain, read_recipe

RECORD_FILE = ".hf_lnlm_trained.json"
_FREE = """
    output_dir max_steps num_train_epochs save_strategy save_steps save_total_limit logging_strategy logging_steps
    logging_first_step logging_dir log_level log_level_replica log_on_each_node logging_nan_inf_filter
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size eval_accumulation_steps
    eval_use_gather_object disable_tqdm report_to run_name project trackio_space_id dataloader_num_workers
    dataloader_prefetch_factor dataloader_persistent_workers dataloader_pin_memory push_to_hub hub_model_id
    hub_strategy hub_private_repo hub_always_push hub_revision enable_jit_checkpoint stop_on_nonfinite
    skip_memory_metrics use_cpu ddp_timeout torch_empty_cache_steps per_device_train_batch_size
    gradient_accumulation_steps
"""
FREE = frozenset(_FREE.split())
"""Keys of `training` that may change when a run goes on; the last two as far as rows a step stay the same."""
SAME = ("model", "tokenizer", "data", "objective", "lora")
"""Sections in which nothing may change, but for `LATER`."""
LATER = {"lora": {"merge"}, "data": {"source", "validation"}}
"""What may change all the same: data are judged by what they hold, not by where they lie."""
CUT = {"mode", "block_size", "frame", "streaming"}
"""How rows are cut: stays with other data, too."""
_SCHEDULE = ("max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs",
             "warmup_steps", "warmup_ratio", "optim", "weight_decay")  # fmt: skip
_MOST_FILES = 256
_SHOWN = 3


@dataclass
class Seen:
    """The rows that a run is trained on, as they are read: texts, or mappings.

    Attributes:
        train, held: training and validation rows; None for rows that are drawn, and for streams.
        first: makes the training dataset of those rows only that an earlier fingerprint was taken of.
    """

    train: Iterable[Any] | None = None
    held: Iterable[Any] | None = None
    first: Any = None


@dataclass
class History:
    """The parts of a run so far.

    Attributes:
        parts: as they are written, oldest first; none for a new run, or a folder of a version that kept no record.
    """

    parts: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> History:
        """The history in a run's folder, empty if there is none.

        Raises:
            UsageProblem: the record is damaged.
        """
        if not (folder / RECORD_FILE).exists():
            return cls()
        try:
            parts = read_json(folder / RECORD_FILE)["parts"]
            for part in parts:
                _check_part(part)
        except (BadFile, KeyError, TypeError, ValueError) as error:
            raise UsageProblem(f"{folder / RECORD_FILE} is damaged ({error}): delete it to go on unchecked") from None
        return cls(parts)

    def write(self, folder: Path) -> None:
        """Write the record, whole or not at all."""
        write_text(folder / RECORD_FILE, json.dumps({"parts": self.parts}, indent=1, ensure_ascii=False) + "\n")

    def at(self, step: int) -> dict[str, Any] | None:
        """The part that holds `step`; forgets what a run from there trains anew."""
        self.parts = [part for part in self.parts if part["step"] <= step]
        return self.parts[-1] if self.parts else None

    def go_on(self, part: dict[str, Any]) -> None:
        """Add a part, unless it is as the last but for where it begins."""
        if not self.parts or {**self.parts[-1], "step": part["step"]} != part:
            self.parts.append(part)


def _check_part(part: dict[str, Any]) -> None:
    """Raise unless a part of a record that was read holds all that going on asks of it.

    Raises:
        KeyError: something is missing.
        TypeError: something is of another type.
        ValueError: a number is out of range.
    """
    data, rows = part["data"], part["data"]["rows"]
    numbers = [part["step"], *part["data_since"], part["processes"], part["rows_a_step"]]
    numbers += [file["bytes"] for file in data["files"]]
    texts = [part["tokenizer"] or "", part["base"] or "", data["validation"] or ""]
    texts += [value for file in data["files"] for value in (file["name"], file["digest"])]
    if rows:
        found = Fingerprint.of(rows)
        numbers += [found.rows, found.bytes, found.every]
        texts += [found.digest, found.marks]
    if not (all(type(number) is int for number in numbers) and all(isinstance(text, str) for text in texts)):
        raise TypeError("a number or a text was wanted")
    if min(numbers) < 0 or (rows and rows["every"] < 1) or len(part["data_since"]) != 2:
        raise ValueError("a number is out of range")
    if not isinstance(part["versions"], dict):
        raise TypeError("versions must be an object")


def describe_part(recipe: Recipe, data: dict[str, Any], step: int, since: tuple[int, int]) -> dict[str, Any]:
    """What a run is trained with from a step on; the tokenizer's digest is added when it has been saved.

    Args:
        recipe: resolved.
        data: as `describe_data` gives it.
        step: first of the part.
        since: step and epoch at which the data began.
    """
    packages = ("hf_lnlm", "torch", "transformers", "accelerate", "tokenizers", "datasets", "numpy")
    training = recipe.training
    return {
        "step": step,
        "data_since": list(since),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "processes": world_size(),
        "rows_a_step": rows_a_step(training),
        "tokenizer": None,
        "base": base_digest(recipe),
        "labels": recipe.model.labels,
        "objective": {"name": recipe.objective.name, **recipe.objective.options},
        "seed": training.get("seed"),
        "data_seed": training.get("data_seed"),
        "schedule": {name: training[name] for name in _SCHEDULE if name in training},
        "data": data,
    }


def describe_data(
    recipe: Recipe, seen: Seen, before: Mapping[str, Any] | None
) -> tuple[dict[str, Any], Comparison | None]:
    """What the data are, and what became of the training rows since an earlier description; None for a stream.

    Args:
        recipe: names the sources.
        seen: the rows.
        before: the earlier description.
    """
    earlier = before and before["rows"] and Fingerprint.of(before["rows"])
    found = None if seen.train is None else compare(seen.train, earlier or None)
    held = None if seen.held is None else compare(seen.held).now.digest
    names = {"source": source_name(recipe.data.source)} if recipe.data.source else {}
    described = {**names, "files": files_of_source(recipe), "rows": found and found.now.plain(), "validation": held}
    return described, found


def files_of_source(recipe: Recipe) -> list[dict[str, Any]]:
    """Name, size and digest of each file of training rows, the first 256 of them; none for a dataset by name."""
    sources = recipe.data.source if isinstance(recipe.data.source, list) else [recipe.data.source]
    files = [file for source in sources if source not in (None, "stdlib", "dates") for file in expand(source)]
    return [{"name": str(file), **file_print(file)} for file in files[:_MOST_FILES]]


def base_digest(recipe: Recipe) -> str | None:
    """One digest of the weights that training began from, None where they lie in no folder here."""
    folder = Path(str(recipe.model.checkpoint))
    files = sorted(folder.glob("*.safetensors")) if recipe.model.checkpoint and folder.is_dir() else []
    prints = json.dumps([file_print(file) for file in files])
    return hashlib.blake2b(prints.encode(), digest_size=16).hexdigest() if files else None


def tokenizer_digest(folder: Path) -> str | None:
    """Digest of the tokenizer saved in a folder, None if there is none."""
    files = [folder / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")]
    found = next((file for file in files if file.is_file()), None)
    return None if found is None else hashlib.sha256(found.read_bytes()).hexdigest()


def saved_tokenizer(folder: Path, history: History) -> str | None:
    """The folder of the tokenizer that the checkpoints of a run were trained with, None where no checkpoint has one.

    Raises:
        UsageProblem: the record knows another than all that are there.
    """
    from ..trainer.checkpoints import list_checkpoints

    newest: list[Path] = list_checkpoints(folder)[::-1]
    wanted = history.parts[-1]["tokenizer"] if history.parts else None
    places = [place for place in [*newest, folder] if (digest := tokenizer_digest(place)) and wanted in (None, digest)]
    if newest and wanted and not places:
        raise UsageProblem(f"{folder} holds no tokenizer of those that its weights were trained with: it was changed")
    return str(places[0]) if places and (newest or history.parts) else None


def rows_a_step(training: Mapping[str, Any]) -> int:
    """Rows of all processes that one step of the optimizer takes."""
    rows = int(training.get("per_device_train_batch_size", 8)) * int(training.get("gradient_accumulation_steps", 1))
    return rows * world_size()


def check_overrides(folder: Path, recipe: Recipe, data_changed: bool, complete: bool) -> None:
    """Refuse to go on with a run by other choices than it was begun with, but for those that are truly applied.

    Args:
        folder: the run's.
        recipe: what is asked for.
        data_changed: whether other data were announced.
        complete: the recipe is resolved, so that what it lacks counts too.

    Raises:
        UsageProblem: naming the first key that differs, with both values.
    """
    begun, now = plain(read_recipe(folder / RECIPE_FILE)), plain(recipe)
    for section in (*SAME, "training"):
        before, after = begun.get(section, {}), now.get(section, {})
        free = FREE if section == "training" else LATER.get(section, set())
        if section == "data" and data_changed:
            free = {*before, *after} - CUT
        for key in sorted({*before, *after} if complete else after):
            if before.get(key) != after.get(key) and key not in free:
                raise UsageProblem(
                    f"{folder} was begun with {section}.{key}={before.get(key)!r}, now {after.get(key)!r}: "
                    "resume it as it was, or give another --output"
                )
    _check_length(begun.get("training", {}), now.get("training", {}))


def _check_length(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    epochs = (before.get("num_train_epochs"), now.get("num_train_epochs"))
    if now.get("max_steps", -1) > 0 and epochs[0] != epochs[1] and epochs[1] is not None:
        raise UsageProblem(
            f"training.num_train_epochs={epochs[1]} has no effect beside training.max_steps={now['max_steps']}: "
            "set training.max_steps"
        )


def check_batches(folder: Path, recipe: Recipe, before: Mapping[str, Any]) -> None:
    """Refuse other rows a step, and another way to come to them where the data are cut by it.

    Raises:
        UsageProblem: naming rows a step and processes of then and now.
    """
    training, processes = recipe.training, world_size()
    begun = read_recipe(folder / RECIPE_FILE).training
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    alike = before["processes"] == processes and all(begun.get(key) == training.get(key) for key in keys)
    if before["rows_a_step"] != rows_a_step(training):
        raise UsageProblem(
            f"{folder} was begun with {before['rows_a_step']} rows a step on {before['processes']} processes, now "
            f"{rows_a_step(training)} on {processes}: {' x '.join(keys)} x processes must stay the same"
        )
    drawn = recipe.data.source is None or recipe.data.streaming or training.get("carry_state")
    if not alike and (drawn or training.get("dataloader_drop_last") or training.get("train_sampling_strategy")):
        raise UsageProblem(f"{folder}: batches and processes must stay as they were, since its rows are drawn by them")
    if before["processes"] != processes:
        warn(f"begun on {before['processes']} processes, now {processes}: what is random differs from here on")


def say_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn of other versions than a run was begun with."""
    changed = [f"{name} {before.get(name)} → {new}" for name, new in now.items() if before.get(name) != new]
    if changed:
        warn(f"begun with other versions ({', '.join(changed)}): results may differ in the last bits")


def what_changed(before: Mapping[str, Any], now: Mapping[str, Any], found: Comparison | None, rows: Any = None) -> str:
    """In words: which files changed, how many rows there were and are, and where the first difference lies.

    Args:
        before, now: as `describe_data` gives them.
        found: what became of the rows.
        rows: the training rows; those that know their place tell it.
    """
    told = [text for pair in _paired(before["files"], now["files"]) if (text := _file_change(*pair))]
    parts = told[:_SHOWN] + ([f"{len(told) - _SHOWN} more files"] if len(told) > _SHOWN else [])
    if found is not None:
        parts.append(f"{found.now.rows:,} training rows (were {before['rows']['rows']:,})")
        first, last = found.differs or (found.now.rows, found.now.rows)
        place = getattr(rows[first - 1], "place", "") if isinstance(rows, list) and first <= len(rows) else ""
        where = f"row {first:,}" if first == last else f"among rows {first:,} to {last:,}"
        parts.append(f"the first difference is {where}" + (f" ({place})" if place else ""))
    return ", ".join(parts)


def _paired(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """Files of then and now by name; a single file of another name is taken for the same one, moved."""
    if len(before) == len(now) == 1:
        return [(before[0], now[0])]
    sides = [{file["name"]: file for file in files} for files in (before, now)]
    return [(sides[0].get(name), sides[1].get(name)) for name in sorted({*sides[0], *sides[1]})]


def _file_change(before: Any, now: Any) -> str | None:
    if before is None or now is None:
        return f"{(before or now)['name']} is {'new' if before is None else 'gone'}"
    if before["digest"] == now["digest"]:
        return None
    if before["bytes"] == now["bytes"]:
        return f"{now['name']} has changed ({now['bytes']:,} bytes)"
    return f"{now['name']} has {now['bytes']:,} bytes (had {before['bytes']:,})"
