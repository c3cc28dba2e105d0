"""Prediction: a file in, a file with what a checkpoint says of each of its rows out.

While it works, answers stand in `OUTPUT.part`: a line that says what was asked, then one line of JSON a row, in the order
of the rows. A run that is begun again goes on behind them; the output itself is written at the end, whole.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..data.labelled import LabelledRows, load_rows, read_cells
from ..data.published import published_columns
from ..data.readers import FileOptions, Place, Record, expand
from ..data.sources import load_documents
from ..data.tokenizers import check_vocabulary
from ..errors import UsageProblem
from ..hub.card import auto_class
from ..hub.folder import json_text, write_text
from .answers import Asker, asker_class
from .evaluate import evaluation_recipe
from .finetune import head_options, objective_class, require_head
from .labelled import LONGEST_ROW, classes_of
from .lock import FolderLock
from .models import adapter_settings, load_config, load_padding_tokenizer, load_trained
from .output import say, tell_skipped, warn
from .pretrain import fit_block
from .recipe import RECIPE_FILE, ModelSection, Recipe
from .request import recipe_keys

BATCH = 32
"""Rows of a batch, unless training.per_device_eval_batch_size says otherwise."""
CHUNK = 64
"""Batches whose rows are sorted by length together and written together."""
ENDINGS = (".csv", ".jsonl")
KEPT = "columns that are kept"
"""Key of a row that was read: what is repeated beside its answer, as it stood."""
_SETTINGS = ("per_device_eval_batch_size", "use_cpu", "bf16", "seed")
_OF_A_MODEL = ("config.json", "*.safetensors", "adapter_config.json", "tokenizer*", "vocab*", "merges.txt")

Answer = dict[str, Any]


def predict(
    checkpoint: str | Path,
    data: Any = None,
    *,
    output: str | Path | None = None,
    keep: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    settings: Sequence[str] = (),
    trust_remote_code: bool | None = None,
    allow_new_weights: bool = False,
    **overrides: Any,
) -> list[Answer]:
    """Ask a checkpoint about every row, as `hf-lnlm predict` does.

    Args:
        checkpoint: folder or Hub repository.
        data: a file, glob, dataset's name or folder; or a list of rows (mappings) or texts. Lines of a text file are rows.
        output: a `.csv` or `.jsonl` file to write, or None.
        keep: columns of the rows that are repeated beside the answers, as `given_…` where those have one of the name.
        resume: said by those who know that a part of the output is there; a part that fits is gone on from anyway.
        overwrite: write over an output, or a part of one, that is there.
        settings, overrides: see `flows.request.Request`: `task="causal"`, `text_column="title"`, `skip_bad_rows=True`.
        trust_remote_code: run Python code that the checkpoint carries.
        allow_new_weights: draw a head at random where the checkpoint has none.

    Returns:
        For each row `row` (its number from 1), the columns to keep, and by task: `label`, `score`, `scores`; `labels`,
        `scores`; `value`; `tags`, `scores`; `answer`, `start`, `score`; `choice`, `text`, `scores`; `text`; of language
        models `tokens`, `loss` (nats a token), `perplexity` and, for causal ones, `bits_per_byte`.

    Raises:
        ValueError: checkpoint, data and task don't fit each other, a row is bad, or the output is in the way; nothing that
            was there has been changed then.
    """
    target = None if output is None else Path(output)
    _check_target(target, resume, overwrite)
    recipe = prediction_recipe(str(checkpoint), data, settings, bool(trust_remote_code), overrides)
    _check_not_read(target, recipe.data.source)
    asker = loaded_asker(recipe, allow_new_weights)
    rows = _read(recipe, asker, keep)
    batch = int(recipe.training.get("per_device_eval_batch_size", BATCH))
    if target is None:
        return [answer for part in _answers(asker, rows, batch, 0) for answer in part]
    asked = _asked(recipe, asker, rows, keep, batch)
    found = _written(target, asked, overwrite, partial(_answers, asker, rows, batch), len(rows))
    if asker.cut:
        warn(f"{asker.cut} of {len(rows)} rows are longer than data.block_size={asker.length} tokens and were cut")
    return found


def _check_target(target: Path | None, resume: bool, overwrite: bool) -> None:
    """Refuse an output that can't or must not be written, before anything is loaded."""
    if resume and overwrite:
        raise UsageProblem("--resume goes on with a part and --overwrite begins anew; give one of them")
    if target is None:
        if resume or overwrite:
            raise UsageProblem("--resume and --overwrite are about --output: give it too")
        return
    if target.suffix not in ENDINGS:
        raise UsageProblem(f"--output must end in {' or '.join(ENDINGS)}, got {str(target)!r}")
    if target.is_dir() or not target.parent.is_dir():
        raise UsageProblem(f"--output names a file in a folder that exists, got {str(target)!r}")
    if target.exists() and not overwrite:
        raise UsageProblem(f"{target} is there already: --overwrite writes over it, --output elsewhere")
    if resume and not target.with_name(target.name + ".part").is_file():
        raise UsageProblem(f"nothing to resume: no {target}.part")


def _check_not_read(target: Path | None, source: Any) -> None:
    """Refuse to write over the rows that are asked about."""
    named = [item for item in (source if isinstance(source, list) else [source]) if isinstance(item, str)]
    if target is None or not target.exists() or "stdlib" in named:
        return
    if any(file.samefile(target) for item in named for file in expand(item)):
        raise UsageProblem(f"{target} is read by this run and would be written over: give another --output")


def prediction_recipe(name: str, data: Any, settings: Sequence[str], trust: bool, overrides: dict[str, Any]) -> Recipe:
    """What is asked of which checkpoint about which rows."""
    given = isinstance(data, (list, tuple)) and bool(data) and not all(Path(str(item)).exists() for item in data)
    flags = dict(recipe_keys(overrides))
    if data is not None:
        flags["data.source"] = "rows" if given else str(data) if isinstance(data, Path) else data
    if "data.source" not in flags and not any(item.startswith("data.source=") for item in settings):
        raise UsageProblem(f"nothing says what to ask {name} about: give --data")
    chosen = {item.partition("=")[0] for item in settings} | flags.keys()
    if unknown := sorted(key for key in chosen if key.startswith("training.") and key[9:] not in _SETTINGS):
        raise UsageProblem(f"{unknown[0]} means nothing here: of training, predict takes {', '.join(_SETTINGS)}")
    if "objective.name" not in chosen and not (Path(name) / RECIPE_FILE).is_file():
        config = load_config(ModelSection(checkpoint=name, trust_remote_code=trust))
        if getattr(config, "is_encoder_decoder", False):  # of the objectives it fits span, which has no answers
            flags["objective.name"] = "text_to_text"
    recipe = evaluation_recipe(name, flags, settings, trust)
    if "data.unit" not in chosen:
        recipe.data.unit = "line"
    if given:
        rows: Any = [dict(row) if isinstance(row, dict) else {recipe.data.text_column: row} for row in data]
        recipe.data.source = rows
    batch = recipe.training.get("per_device_eval_batch_size", BATCH)
    if batch < 1:
        raise UsageProblem(f"training.per_device_eval_batch_size must be at least 1, got {batch}")
    return recipe


def loaded_asker(recipe: Recipe, allow_new_weights: bool) -> Asker:
    """The recipe's checkpoint, ready to be asked."""
    import torch

    objective = objective_class(str(recipe.objective.name))(**recipe.objective.options)
    kind = asker_class(objective)
    config = load_config(recipe.model)
    tokenizer = load_padding_tokenizer(str(recipe.model.checkpoint), recipe.model)
    auto = objective.auto_class if objective.labelled else objective.loader(config)
    if not allow_new_weights:
        _require_trained_head(recipe, config, auto)
    if objective.labelled:
        require_head(config, objective)
        adapter = adapter_settings(str(recipe.model.checkpoint)) is not None
        fields = objective.head_fields(recipe.model.labels or ())
        options = head_options(config, tokenizer, fields) if adapter else {}
    else:
        objective.check(config, tokenizer)
        options = objective.continuation_overrides(config, recipe.objective.options)
    fit_block(recipe, config, LONGEST_ROW if objective.labelled else 128)
    model = load_trained(recipe.model, auto, allow_new_weights, **options).eval()
    check_vocabulary(tokenizer, model.config)
    if objective.labelled and objective.head_fields(("a", "b")):
        objective = objective.reading(classes_of(model.config), only=False)
    device = None if recipe.training.get("use_cpu") else torch.accelerator.current_accelerator(check_available=True)
    if hasattr(model.config, "use_cache") and not objective.labelled:
        model.config.use_cache = False
    return kind(objective, tokenizer, model.to(device or "cpu"), recipe)


def _require_trained_head(recipe: Recipe, config: Any, auto: str) -> None:
    """Refuse a checkpoint whose head is another's: a new one would answer by chance."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    found = auto_class(architecture)
    if (
        found
        and found != auto
        and not _is_named(config, auto, architecture)
        and adapter_settings(str(recipe.model.checkpoint)) is None
    ):
        raise UsageProblem(
            f"task {recipe.objective.name!r} needs {auto}; {recipe.model.checkpoint} holds {architecture}, which has "
            "learnt something else"
        )


def _is_named(config: Any, auto: str, architecture: str) -> bool:
    """Whether an Auto class builds just this class of a config, whatever its name says: MarianMTModel is a whole head."""
    import transformers

    mapping = getattr(transformers, auto)._model_mapping
    return type(config) in mapping and mapping[type(config)].__name__ == architecture


def _read(recipe: Recipe, asker: Asker, keep: Sequence[str]) -> list[Any]:
    """The recipe's rows; bad ones are refused or left out. The place of a row has its number among all rows, from 1."""
    data = recipe.data
    options = FileOptions(data.encoding, data.errors, data.unit, None, data.quoted, data.skip_bad_rows)
    if data.source == "stdlib" and not asker.objective.labelled:
        documents = load_documents("stdlib", limit=data.limit).train
        rows = LabelledRows([Record(row, Place("stdlib", n)) for n, row in enumerate(documents, start=1)])
    else:
        rows = load_rows(data.source, (), task=asker.objective.name, options=options, limit=data.limit)
    if asker.objective.labelled and not set(asker.objective.inputs(data)) <= set(rows.train[0]):
        changed = published_columns(asker.objective.name, rows.train[0], data, answered=False)
        vars(data).update(changed)
        if changed:
            say(f"columns    {', '.join(asker.objective.inputs(data))}", sys.stderr)
    records: list[Any] = rows.train
    for row in records:
        lacking = [column for column in keep if column not in row]
        if lacking and row.fault is None:
            listed = ", ".join(map(str, row))
            raise UsageProblem(f"{row.place}: no column {lacking[0]!r} to keep; its columns are {listed}")
    found = read_cells(LabelledRows(rows.train), asker.read, data.skip_bad_rows)
    tell_skipped(found.skipped, len(found.train))
    raw = {row.place: (number, {name: row.get(name) for name in keep}) for number, row in enumerate(records, start=1)}
    numbered: list[Any] = []
    for row in found.train:
        number, kept = raw[row.place]  # type: ignore[attr-defined]
        numbered.append(Record({**row, KEPT: kept}, row.place._replace(row=number)))  # type: ignore[attr-defined]
    return numbered


def _answers(asker: Asker, rows: list[Any], batch: int, done: int) -> Iterator[list[Answer]]:
    """Answers of the rows from `done` on, chunk by chunk, in their order.

    A chunk that is there in part is asked as a whole again: in batches of other rows its answers would differ by rounding.
    """
    from tqdm import tqdm

    chunk = batch * CHUNK
    with tqdm(total=len(rows), initial=done, unit="row", disable=not sys.stderr.isatty(), delay=1) as bar:
        for start in range(done - done % chunk, len(rows), chunk):
            asked = rows[start : start + chunk]
            items = asker.items(asked)
            order = sorted(range(len(items)), key=lambda at: (items[at].kind, -items[at].size, at))
            said: list[Any] = [None] * len(items)
            for places in _batches(items, order, batch):
                for at, answer in zip(places, asker.ask([items[at].content for at in places])):
                    said[at] = answer
            parts: list[list[Any]] = [[] for _ in asked]
            for item, answer in zip(items, said):
                parts[item.row].append(answer)
            found = [_whole(row, asker.joined(mine)) for row, mine in zip(asked, parts)]
            fresh = found[max(0, done - start) :]
            bar.update(len(fresh))
            yield fresh


def _batches(items: Sequence[Any], order: Sequence[int], size: int) -> Iterator[list[int]]:
    """Places of items, at most `size` together and of one kind."""
    here: list[int] = []
    for at in order:
        if here and (len(here) == size or items[here[0]].kind != items[at].kind):
            yield here
            here = []
        here.append(at)
    if here:
        yield here


def _whole(row: Any, answer: Answer) -> Answer:
    """An answer with the columns to keep; one of a name that the answer has is `given_…`."""
    kept = {f"given_{name}" if name in answer or name == "row" else name: value for name, value in row[KEPT].items()}
    return {"row": row.place.row, **kept, **answer}


def _asked(recipe: Recipe, asker: Asker, rows: Sequence[Any], keep: Sequence[str], batch: int) -> Answer:
    """What is asked, in a form that tells a part of one output from a part of another."""
    name = str(recipe.model.checkpoint)
    files = sorted({path for glob in _OF_A_MODEL for path in Path(name).glob(glob)}) if Path(name).is_dir() else []
    marks = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    rest = [recipe.objective.options, asker.length, recipe.data.frame, bool(recipe.training.get("bf16"))]
    return {
        "checkpoint": str(Path(name).resolve()) if files else name,
        "model": _digest([marks or getattr(asker.model.config, "_commit_hash", None), recipe.model.revision]),
        "task": asker.objective.name,
        "data": _digest([dict(row) for row in rows]),
        "settings": _digest([rest, list(keep), batch]),
    }


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, default=str, sort_keys=True).encode(), digest_size=16).hexdigest()


def _begin(part: Path, asked: Answer, overwrite: bool) -> int:
    """Make the part, or cut off what was half written of it; returns how many answers it holds.

    Raises:
        UsageProblem: it answers something else, or is no part at all.
    """
    if part.is_symlink():
        raise UsageProblem(f"{part} is a link: remove it")
    if part.exists() and not overwrite:
        lines, size = _lines(part)
        before = lines[0] if lines else {}
        if not asked.keys() <= before.keys() and part.stat().st_size:
            raise UsageProblem(f"{part} is no part of answers: --overwrite writes over it, --output elsewhere")
        differ = [name for name in asked if before.get(name) != asked[name]]
        if lines and differ:
            raise UsageProblem(
                f"{part} was begun with another {' and '.join(differ)}: --overwrite begins anew, --output elsewhere"
            )
        if lines:
            os.truncate(part, size)
            return len(lines) - 1
    write_text(part, json.dumps(asked) + "\n")
    return 0


def _written(target: Path, asked: Answer, overwrite: bool, answers: Any, rows: int) -> list[Answer]:
    """All answers, after they were written as `target`, those first that its part lacks."""
    part = target.with_name(target.name + ".part")
    with FolderLock(target.parent, target.name) as lock:
        lock.take()
        done = _begin(part, asked, overwrite)
        if done:
            say(f"goes on at row {done + 1} of {rows}", sys.stderr)
        with part.open("a", encoding="utf-8") as file:
            for fresh in answers(done):
                file.write("".join(map(_line, fresh)))
                file.flush()
        found = _lines(part)[0][1:]
        write_text(target, _as_csv(found) if target.suffix == ".csv" else "".join(map(_line, found)))
        part.unlink()
    return found


def _lines(part: Path) -> tuple[list[Answer], int]:
    """The whole lines of a part, and their bytes."""
    found, size = [], 0
    with part.open("rb") as file:
        for line in file:
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                value = None
            if not isinstance(value, dict):
                break
            found.append(value)
            size += len(line)
    return found, size


def _line(answer: Answer) -> str:
    return json_text(answer) + "\n"


def _as_csv(answers: Sequence[Answer]) -> str:
    """Rows of CSV: tags with spaces, labels with `|`, as our readers read them; other lists and mappings as JSON."""
    columns = list(dict.fromkeys(name for answer in answers for name in answer))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([[_cell(name, answer.get(name)) for name in columns] for answer in answers])
    return text.getvalue()


def _cell(name: str, value: Any) -> Any:
    mark = {"tags": " ", "labels": "|"}.get(name)
    if mark and isinstance(value, list) and all(isinstance(item, str) and mark not in item for item in value):
        return mark.join(value)
    return json_text(value) if isinstance(value, (list, dict)) else value
