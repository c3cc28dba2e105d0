"""Learning curves: `metrics.csv` in every run's folder, written as it trains, and the picture of one run or of several."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..errors import UsageProblem
from ..hub.folder import read_text, write_text
from .manifest import RUN_MANIFEST, record
from .output import new_figure, save_picture, warn

METRICS_FILE = "metrics.csv"
CURVES_FILE = "curves.png"
FIRST = ("step", "epoch")
"""Columns that stand first: steps of the optimizer, and passes over the data."""
LEFT_OUT = ("total_flos", "train_runtime", "train_loss", "train_samples_per_second", "train_steps_per_second")
"""What Trainer says once at the end, of the run as a whole."""
VALIDATED = (
    "eval_bits_per_byte", "eval_perplexity", "eval_f1", "eval_accuracy", "eval_exact_match", "eval_spearman",
    "eval_micro_f1", "eval_wrong_bits",
)  # fmt: skip
"""Measures of the validation data; the first that a run has is drawn beside the losses."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C6D31")
"""Distinguishable to colour-blind readers (Okabe and Ito), and one more."""
STYLES = ("-", (0, (6, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_LINE_HEIGHT = 1.35  # of names one below the other, in their font's size

Curve = list[tuple[float, float]]
Curves = dict[str, Curve]
"""Column → (step, value) where it has one."""


class WriteMetrics(TrainerCallback):
    """Keeps `metrics.csv` as the Trainer's log has it: a resumed run drops what was logged beyond its checkpoint.

    Long logs are written once in a hundredth more, and at every checkpoint, so that their writing stays cheap.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with what a checkpoint brought."""
        if state.is_world_process_zero and (Path(args.output_dir) / METRICS_FILE).is_file():
            self._write(args, state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the table anew, whole or not at all."""
        length = len(state.log_history)
        if state.is_world_process_zero and length % max(1, length // 100) == 0:
            self._write(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the table as the checkpoint has it."""
        if state.is_world_process_zero and state.log_history:
            self._write(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the whole table."""
        self.on_save(args, state, control)

    def _write(self, args: Any, state: Any) -> None:
        folder = Path(args.output_dir)
        write_text(folder / METRICS_FILE, metrics_table(state.log_history))
        if (folder / RUN_MANIFEST).is_file():
            record(folder, [folder / METRICS_FILE])


def metrics_table(history: Sequence[Mapping[str, Any]]) -> str:
    """The entries of a Trainer's log as CSV: a row an entry, empty where it lacks a figure.

    Args:
        history: `state.log_history`.

    >>> print(metrics_table([{"step": 1, "loss": 2.5}, {"step": 1, "eval_loss": 2.0}]), end="")
    step,epoch,loss,eval_loss
    1,,2.5,
    1,,,2.0
    """
    rows = [{name: value for name, value in entry.items() if name not in LEFT_OUT} for entry in history]
    rows = [row for row in rows if row.keys() - set(FIRST)]
    columns = [*FIRST, *sorted({name for row in rows for name in row} - set(FIRST), key=_order)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _order(name: str) -> tuple[bool, bool, str]:
    return name.startswith("eval_"), name not in ("loss", "learning_rate"), name


def read_curves(run: str | Path) -> Curves:
    """The curves of a run.

    Args:
        run: its folder, or its `metrics.csv`.

    Raises:
        UsageProblem: there is no table, or it is none that a run wrote.
    """
    path = Path(run) / METRICS_FILE if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise UsageProblem(f"no {METRICS_FILE} in {run}: it is no run's folder, or the run has logged nothing yet")
    curves: Curves = {}
    for number, row in enumerate(csv.DictReader(io.StringIO(read_text(path))), start=2):
        try:
            step = float(row["step"])
            cells = [(name, float(value)) for name, value in row.items() if value and name not in FIRST]
        except (KeyError, TypeError, ValueError):
            raise UsageProblem(f"{path}, line {number}: a step and numbers wanted, as a run writes them") from None
        for name, value in cells:
            curves.setdefault(name, []).append((step, value))
    return curves


def draw_curves(runs: Mapping[str, Curves], path: str | Path, metric: str | None = None) -> None:
    """Draw losses, a measure of the validation data, learning rate and throughput; a colour and line style a run.

    Args:
        runs: name → curves.
        path: picture to write; its ending says the format.
        metric: column that is drawn beside the losses; None for the first of `VALIDATED` that a run has.

    Raises:
        ImportError: the extra `plot` is not installed.
        UsageProblem: no run has that column.
        BadFile: there is a link in the picture's place.
    """
    known = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    if metric is not None and metric not in known:
        raise UsageProblem(f"no run has {metric!r}; they have {', '.join(known) or 'nothing'}")
    validated = metric or next((name for name in VALIDATED if name in known), None)
    panels = [("loss", ["loss", "eval_loss"]), (validated or "", [validated] if validated else [])]
    panels += [("learning rate", ["learning_rate"]), ("tokens per second", ["tokens_per_second"])]
    figure = new_figure(figsize=(9.6, 6.2), dpi=110)
    shown = [(title, columns) for title, columns in panels if any(name in known for name in columns)]
    for number, (title, columns) in enumerate(shown, start=1):
        axes = figure.add_subplot((len(shown) + 1) // 2, min(2, len(shown)), number)
        _draw_panel(axes, runs, columns)
        axes.set_title(title.removeprefix("eval_").replace("_", " "), loc="left", fontsize=10)
    _draw_names(figure, runs, "eval_loss" in known)
    figure.tight_layout(rect=(0, 0.06 + 0.03 * ((len(runs) + 3) // 4), 1, 1))
    save_picture(figure, Path(path))


def style_of(number: int) -> dict[str, Any]:
    """Colour and line style of a curve: neighbours differ in both, and 32 have one each."""
    colour, turn = number % len(COLOURS), number // len(COLOURS)
    return {"color": COLOURS[colour], "linestyle": STYLES[(number + turn) % len(STYLES)]}


def draw_line(axes: Any, number: int, curve: Curve, **options: Any) -> None:
    """Draw one curve in its own colour and line style.

    Args:
        axes: of matplotlib.
        number: of the curve, see `style_of`.
        curve: its points.
        options: of matplotlib's `plot`, beside or instead of the style.
    """
    across, up = zip(*curve)
    axes.plot(across, up, **{**style_of(number), "linewidth": 1.6, **options})


def dress(axes: Any, across: str) -> None:
    """Give axes the looks that all curves have.

    Args:
        axes: of matplotlib.
        across: name of the horizontal axis.
    """
    axes.set_xlabel(across, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def name_ends(axes: Any, ends: Sequence[tuple[str, float, Any]], size: float = 9) -> None:
    """Write names right of the axes, each at the height where its line ends, moved apart where they would overlap.

    Args:
        axes: of matplotlib, with their final limits and place in the figure.
        ends: name, height of the line's end, and colour.
        size: of the font, in points.
    """
    extent = axes.get_position()
    inches = extent.height * axes.figure.get_figheight()
    low, high = axes.get_ylim()
    wanted = [(height - low) / (high - low) for _, height, _ in ends]
    for (name, height, colour), place in zip(ends, spread(wanted, _LINE_HEIGHT * size / 72 / inches), strict=True):
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
        axes.annotate(
            name, (1, height), (1.03, place), xycoords=("axes fraction", "data"), textcoords="axes fraction",
            color=colour, fontsize=size, va="center", parse_math=False, annotation_clip=False, arrowprops=leader,
        )  # fmt: skip


def spread(wanted: Sequence[float], apart: float) -> list[float]:
    """Places as near to those wanted as they can be in the same order, between 0 and 1 and at least `apart`.

    Args:
        wanted: places, in any order.
        apart: least distance; more than fit lie closer.

    >>> [round(place, 2) for place in spread([0.5, 0.52, 1.0, 0.98], 0.1)]
    [0.5, 0.6, 1.0, 0.9]
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    apart = min(apart, 1 / max(1, len(wanted) - 1))
    places = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        lowest = places[order[rank - 1]] + apart if rank else 0.0
        places[index] = max(wanted[index], lowest)
    for rank, index in reversed(list(enumerate(order))):
        highest = places[order[rank + 1]] - apart if rank + 1 < len(order) else 1.0
        places[index] = min(places[index], highest)
    return places


def _draw_panel(axes: Any, runs: Mapping[str, Curves], columns: Sequence[str]) -> None:
    for number, curves in enumerate(runs.values()):
        for column in columns:
            if curve := curves.get(column):
                held = column.startswith("eval_")
                faint = 0.55 if not held and "eval_loss" in columns else 1.0
                draw_line(axes, number, curve, alpha=faint, marker="o" if held else None, markersize=3.5)
    dress(axes, "step")


def _draw_names(figure: Any, runs: Mapping[str, Curves], held: bool) -> None:
    """The runs' names below the panels, where they cover nothing."""
    from matplotlib.lines import Line2D

    # a label that begins with an underscore would be left out
    labels = [f" {name}" if name.startswith("_") else name for name in runs]
    lines = [Line2D([], [], label=label, linewidth=2, **style_of(number)) for number, label in enumerate(labels)]
    if held:
        lines.append(Line2D([], [], label="validation", color="0.4", marker="o", markersize=3.5, linewidth=1.2))
    legend = figure.legend(handles=lines, loc="lower center", ncols=min(len(lines), 4), frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)


def draw_run(folder: Path) -> None:
    """Draw a run's own curves beside them, if it has any and matplotlib is installed; no run that is done fails by it."""
    from importlib.util import find_spec

    if not (folder / METRICS_FILE).is_file() or find_spec("matplotlib") is None:
        return
    try:
        if curves := read_curves(folder):
            draw_curves({folder.name: curves}, folder / CURVES_FILE)
    except Exception as error:
        warn(f"no {CURVES_FILE}: {' '.join(str(error).split())}")


def names_of(runs: Sequence[str]) -> list[str]:
    """Names that tell runs apart: of their folders, or whole paths where those are the same.

    Raises:
        UsageProblem: a run is given twice.
    """
    if doubled := [run for run in runs if runs.count(run) > 1]:
        raise UsageProblem(f"{doubled[0]} is given twice")
    names = [Path(run).name if Path(run).is_dir() else Path(run).parent.name for run in runs]
    return names if len(set(names)) == len(names) else [str(Path(run)) for run in runs]
