"""Output folders: new ones, those to resume, those to overwrite; and the files a run leaves in them."""

from __future__ import annotations

import io
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import UsageProblem, printable
from ..hub.folder import clear_drafts, is_draft, write_bytes, write_text
from .manifest import LOCK_FILE, RUN_MANIFEST, clear, leftover
from .recipe import RECIPE_FILE, Recipe, dump_recipe

if TYPE_CHECKING:
    from .lock import FolderLock


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


def say(text: str = "", file: TextIO | None = None) -> None:
    """Print a line, from the first process only; to stdout unless told."""
    if is_first_process():
        print(printable(text), file=file, flush=True)


def warn(text: str) -> None:
    """Print a warning on stderr, from the first process only."""
    if is_first_process():
        print(f"warning: {printable(text)}", file=sys.stderr, flush=True)


SHOWN = 3
"""Examples that a warning shows."""


def tell_skipped(skipped: Sequence[str], kept: int) -> None:
    """Warn of bad rows that were left out, with the first of them.

    Args:
        skipped: what is wrong with each, and where it stands.
        kept: rows that are left.
    """
    if skipped:
        more = " …" * (len(skipped) > SHOWN)
        warn(f"skipped {len(skipped)} of {len(skipped) + kept} rows: {'; '.join(skipped[:SHOWN])}{more}")


def new_figure(**options: Any) -> Any:
    """A figure of matplotlib that needs no window; `options` are its size, resolution and layout.

    Raises:
        ImportError: the extra `plot` is not installed.
    """
    try:
        import matplotlib.figure
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'hf_lnlm[plot]'") from error
    figure = matplotlib.figure.Figure(**options)
    FigureCanvasAgg(figure)
    return figure


def save_picture(figure: Any, path: Path, **options: Any) -> None:
    """Save a figure of matplotlib whole or not at all, and through no link; the name's ending says the format.

    Raises:
        ValueError: matplotlib knows no such format.
        BadFile: there is a link or a folder of this name.
    """
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:] or None, **options)
    write_bytes(path, content.getvalue())


def is_filled(folder: Path) -> bool:
    """Whether a folder holds more than a lock, an empty manifest and drafts, which a run leaves that was killed at once."""
    names = {path.name for path in folder.iterdir() if not is_draft(path.name)} if folder.is_dir() else set()
    return bool(names - {LOCK_FILE, RUN_MANIFEST})


def check_output(lock: FolderLock, resume: bool, overwrite: bool, recipe: Recipe | None = None) -> None:
    """Make sure that a run may write into a folder; locks one that holds an earlier run, and changes nothing else.

    Args:
        lock: of the output folder.
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
    folder = lock.folder
    if folder.exists() and not folder.is_dir():
        raise UsageProblem(f"{folder} is a file; --output wants a folder")
    lock.refuse_if_held()
    filled = is_filled(folder)
    is_run = (folder / RECIPE_FILE).is_file()
    if resume and not is_run:
        raise UsageProblem(f"nothing to resume in {folder} (no {RECIPE_FILE})")
    if filled and not resume and not overwrite:
        raise UsageProblem(
            f"{folder} holds files already: --resume goes on, --overwrite starts anew, --output elsewhere"
        )
    if filled and overwrite:
        leftover(folder)
        if recipe is not None:
            _check_not_read(folder, recipe)
    if filled:
        lock.take()


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


def open_output(lock: FolderLock, resume: bool) -> None:
    """Make and lock a folder, after removing what an earlier run wrote there unless that is resumed.

    Comes after `check_output`.

    Raises:
        UsageProblem: another run has begun there since then.
    """
    folder = lock.folder
    if is_first_process():
        if lock.take() and is_filled(folder):
            raise UsageProblem(
                f"{folder} has been filled by something else since this run was started: give another --output"
            )
        clear_drafts(folder)
        if not resume and is_filled(folder):
            found = leftover(folder)
            clear(folder, found)
            for path in found.kept:
                warn(f"{path} stays: the run that was overwritten did not write it")


def write_recipe(folder: Path, recipe: Recipe, command: str) -> None:
    """Write the resolved recipe into `folder`, with a header that says what made it."""
    made = ", ".join(f"{package} {version(package)}" for package in ("hf_lnlm", "torch", "transformers"))
    header = (
        f"Resolved by {made}, Python {platform.python_version()}.\n"
        f"Run it again: hf-lnlm {command} {RECIPE_FILE} --output ANOTHER_FOLDER"
    )
    write_text(folder / RECIPE_FILE, dump_recipe(recipe, header))
