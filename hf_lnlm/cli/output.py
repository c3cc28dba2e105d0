"""Output folders: new ones, those to resume, those to overwrite; and the files a run leaves in them."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from .errors import UsageProblem
from .recipe import RECIPE_FILE, Recipe, dump_recipe, plain, read_recipe

COMPARED_SECTIONS = ("model", "tokenizer", "data", "objective", "lora")
"""What must not change between the parts of one run; `training` may (more steps), and `hub`."""


def is_first_process() -> bool:
    """Whether this process is the one that writes, under torchrun as well as alone."""
    return int(os.environ.get("RANK", "0")) == 0


def plain_when_piped() -> None:
    """Switch off the progress bars of the libraries where no terminal is listening."""
    if sys.stderr.isatty() and is_first_process():
        return
    import datasets
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    disable_progress_bars()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers' and peft's own reports off the terminal; what matters of them is said in our own lines."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)


def say(text: str = "") -> None:
    """Print a line, from the first process only."""
    if is_first_process():
        print(text, flush=True)


def warn(text: str) -> None:
    """Print a warning on stderr, from the first process only."""
    if is_first_process():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def check_output(folder: Path, resume: bool, overwrite: bool, recipe: Recipe | None = None) -> None:
    """Make sure that a run may write into `folder`; changes nothing.

    Args:
        folder: the output folder.
        resume: go on with the run in it.
        overwrite: the run in it will be deleted when training begins.
        recipe: of the new run; what it reads must not be deleted.

    Raises:
        UsageProblem: it is in use, holds something else than a run, holds what the run reads, or there is nothing to
            resume.
    """
    if resume and overwrite:
        raise UsageProblem("--resume goes on with a run and --overwrite deletes it; give one of them")
    if not is_first_process():
        return
    if folder.exists() and not folder.is_dir():
        raise UsageProblem(f"{folder} is a file; --output wants a folder")
    filled = folder.is_dir() and any(folder.iterdir())
    is_run = (folder / RECIPE_FILE).is_file()
    if resume and not is_run:
        raise UsageProblem(f"nothing to resume in {folder} (no {RECIPE_FILE})")
    if filled and not resume and not overwrite:
        raise UsageProblem(
            f"{folder} holds files already: --resume goes on, --overwrite starts anew, --output elsewhere"
        )
    if filled and overwrite and not is_run:
        raise UsageProblem(f"{folder} was not written by hf-lnlm (no {RECIPE_FILE}); delete it yourself if you mean it")
    if filled and overwrite and recipe is not None:
        _check_not_read(folder, recipe)


def _check_not_read(folder: Path, recipe: Recipe) -> None:
    """Refuse to delete what the run itself reads."""
    reward = recipe.objective.options.get("reward")
    for source in (
        recipe.model.checkpoint, recipe.tokenizer.path, recipe.data.source, recipe.data.validation, reward,
    ):  # fmt: skip
        if (
            isinstance(source, str)
            and Path(source).exists()
            and Path(source).resolve().is_relative_to(folder.resolve())
        ):
            raise UsageProblem(
                f"{source} is read by this run and would be deleted with {folder}: give another --output"
            )


def open_output(folder: Path, resume: bool) -> None:
    """Make `folder`, after deleting an earlier run in it unless that is resumed; comes after `check_output`."""
    if is_first_process():
        if not resume and (folder / RECIPE_FILE).is_file():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)


def check_unchanged(folder: Path, recipe: Recipe) -> None:
    """Refuse to resume a run with another model, tokenizer, data or objective than it was begun with.

    Raises:
        UsageProblem: naming the first key that differs, with both values.
    """
    begun, now = plain(read_recipe(folder / RECIPE_FILE)), plain(recipe)
    for section in COMPARED_SECTIONS:
        before, after = begun.get(section, {}), now.get(section, {})
        for key in sorted({*before, *after}):
            if before.get(key) != after.get(key):
                raise UsageProblem(
                    f"{folder} was begun with {section}.{key}={before.get(key)!r}, now {after.get(key)!r}: "
                    "resume it as it was, or give another --output"
                )


def write_recipe(folder: Path, recipe: Recipe, command: str) -> None:
    """Write the resolved recipe into `folder`, with a header that says what made it."""
    made = ", ".join(f"{package} {version(package)}" for package in ("hf_lnlm", "torch", "transformers"))
    header = (
        f"Resolved by {made}, Python {platform.python_version()}.\n"
        f"Run it again: hf-lnlm {command} {RECIPE_FILE} --output ANOTHER_FOLDER"
    )
    (folder / RECIPE_FILE).write_text(dump_recipe(recipe, header), encoding="utf-8")
