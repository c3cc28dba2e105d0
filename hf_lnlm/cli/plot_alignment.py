"""`hf-lnlm plot alignment`: where an encoder-decoder looked in its source while it wrote, as Bahdanau's figure 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..flows.output import new_figure, plain_when_piped, quiet_libraries, save_picture, say
from ..flows.translate import Alignment, alignment
from .plot import check_picture_file

_INCHES, _INK = 0.24, "#22223b"


def plot_alignment(checkpoint: str, text: str, output: str, **options: Any) -> int:
    """Run the command; the arguments are its options.

    Returns:
        The exit status.

    Raises:
        ValueError: see `flows.translate.alignment`, or the output is no picture file.
    """
    plain_when_piped()
    check_picture_file(output)
    new_figure()  # says at once what is missing for pictures
    with quiet_libraries():
        found = alignment(checkpoint, text, **options)
    draw_alignment(found, output)
    say(f"{output}: {' '.join(found.target)}")
    return 0


def draw_alignment(found: Alignment, path: str | Path) -> None:
    """Draw an alignment: source from left to right, target from top to bottom, dark where was looked.

    Args:
        found: tokens and weights.
        path: file name; its ending decides the format.

    Raises:
        ImportError: matplotlib is missing; names its extra.
    """
    across, down = len(found.source), len(found.target)
    size = (max(3.0, min(24.0, _INCHES * across + 2)), max(2.5, min(24.0, _INCHES * down + 2)))
    figure = new_figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(found.weights, cmap="Greys", vmin=0.0, vmax=1.0, interpolation="nearest", aspect="auto")
    axis.xaxis.tick_top()
    axis.set_xticks(range(across), _literal(found.source), rotation=90)
    axis.set_yticks(range(down), _literal(found.target))
    axis.tick_params(length=0, labelsize=8, colors=_INK)
    for side in axis.spines.values():
        side.set(color="#c9c9d1", linewidth=0.6)
    bar = figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02, ticks=(0, 0.5, 1))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, colors=_INK, length=0)
    save_picture(figure, Path(path), dpi=160, facecolor="white")


def _literal(tokens: list[str]) -> list[str]:
    """Tokens with `$` as it is: matplotlib would read a formula between two."""
    return [token.replace("$", r"\$") for token in tokens]
