"""How a classifier does class by class: a table, a JSON file and the confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import UsageProblem
from ..hub.folder import json_text
from ..tasks.classification_metrics import entity_kinds
from .console import table
from .output import new_figure, save_picture, say

REPORT_FILE = "report.json"
PICTURE_FILE = "confusion_matrix.png"
COLUMNS = ("precision", "recall", "f1-score", "support")
MOST_NUMBERS = 30
"""Most classes of a picture whose cells carry numbers."""


def class_report(confusion: Tensor, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of each class and their averages, by scikit-learn's `classification_report`.

    Args:
        confusion: counts `(classes, classes)`: row = label, column = prediction.
        names: the classes in the order of their ids.

    Raises:
        ImportError: the extra `eval` is not installed.
    """
    try:
        from sklearn.metrics import classification_report
    except ModuleNotFoundError as error:
        raise ImportError("a report by class needs scikit-learn: pip install 'hf_lnlm[eval]'") from error
    counts = confusion.cpu().numpy()
    labels, predictions = np.indices(counts.shape)
    found = classification_report(
        labels.ravel(),
        predictions.ravel(),
        sample_weight=counts.ravel(),
        labels=np.arange(len(names)),
        target_names=list(names),
        output_dict=True,
        zero_division=0,
    )
    return {name: value for name, value in found.items() if isinstance(value, dict)}


def entity_report(counts: Tensor, kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of each kind of entity.

    Args:
        counts: `(kinds, 3)`: right, predicted and wanted entities.
        kinds: their names.
    """
    rows = {}
    for kind, (right, predicted, wanted) in zip(kinds, counts.tolist()):
        scores = (right / max(predicted, 1), right / max(wanted, 1), 2 * right / max(predicted + wanted, 1), wanted)
        rows[kind] = dict(zip(COLUMNS, scores))
    return rows


def write_report(folder: Path, sums: Mapping[str, Tensor], names: Sequence[str], title: str) -> None:
    """Print the table by class and write `report.json` and `confusion_matrix.png` into `folder`.

    Args:
        folder: an output or checkpoint folder.
        sums: what a task measured, with `confusion` and perhaps `entities`.
        names: the classes in the order of their ids.
        title: of the picture: model and data.

    Raises:
        UsageProblem: the task has no classes.
    """
    if "confusion" not in sums:
        raise UsageProblem("a report by class needs a task with classes: sequence_classification, token_classification")
    found: dict[str, Any] = {"classes": class_report(sums["confusion"], names)}
    if "entities" in sums:
        found["entities"] = entity_report(sums["entities"], entity_kinds(names))
    found["confusion"] = {"names": list(names), "counts": sums["confusion"].long().tolist()}
    for what in ("classes", "entities"):
        rows = [
            [name, *(f"{row[column]:.3f}" for column in COLUMNS[:3]), f"{row['support']:.0f}"]
            for name, row in found.get(what, {}).items()
        ]
        if rows:
            table(f"By {'class' if what == 'classes' else 'kind of entity'}", [what, *COLUMNS], rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_FILE).write_text(json_text(found, indent=1) + "\n", encoding="utf-8")
    draw_confusion(sums["confusion"], names, folder / PICTURE_FILE, title)
    say(f"saved {folder / REPORT_FILE} and {folder / PICTURE_FILE}")


def draw_confusion(confusion: Tensor, names: Sequence[str], path: Path, title: str) -> None:
    """Draw a confusion matrix: each row is a label, coloured by the share of its texts, numbered by their count.

    Args:
        confusion: counts `(classes, classes)`: row = label, column = prediction.
        names: the classes in the order of their ids.
        path: PNG file to write.
        title: written above it.

    Raises:
        ImportError: the extra `plot` is not installed.
    """
    counts = confusion.cpu().numpy()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(2.6 + 0.52 * len(names), 16.0)
    figure = new_figure(figsize=(size + 0.7, size), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    axes.set_title(title, fontsize=11, loc="left", pad=10)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(-0.5, len(names)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(names)), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    if len(names) <= MOST_NUMBERS:
        _write_counts(axes, counts, shares)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)
    bar.set_label("share of the label's items")
    save_picture(figure, path)


def _write_counts(axes: Any, counts: Any, shares: Any) -> None:
    size = 9.0 if len(counts) <= 8 else 8.0 if len(counts) <= 16 else 6.5
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if shares[row, column] > 0.55 else "#1f2a44"
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", fontsize=size, color=colour)
