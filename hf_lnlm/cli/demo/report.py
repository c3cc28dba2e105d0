"""What the demo leaves behind: the table, the curves as a picture, and REPORT.md."""

from __future__ import annotations

import gzip
import lzma
import platform
import resource
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...flows.output import save_picture
from .race import Contender

REPORT_FILE = "REPORT.md"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
"""Distinguishable to colour-blind readers (Okabe and Ito), and one more."""


@dataclass(frozen=True)
class Claim:
    """Something that the demo asserts, and whether it holds."""

    text: str
    holds: bool


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of general compressors on the same bytes."""
    return {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }


def peak_memory() -> float:
    """Peak memory of this process, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def draw_curves(contenders: list[Contender], baselines: dict[str, float], path: Path) -> bool:
    """Draw bits per byte against CPU seconds.

    Returns:
        Whether matplotlib (extra `plot`) was there to do it.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.8), dpi=120, layout="constrained")
    for contender, colour in zip(contenders, COLOURS * len(contenders), strict=False):
        seconds, bits = zip(*contender.progress.curve, strict=True)
        axes.plot(seconds, bits, color=colour, label=contender.label, linewidth=2)
    for (name, value), style in zip(baselines.items(), ("--", ":"), strict=True):
        axes.axhline(value, color="0.45", linestyle=style, linewidth=1.2, label=f"{name} ({value:.2f})")
    start = max(contender.progress.curve[0][1] for contender in contenders)
    axes.set_ylim(bottom=0, top=min(start, 8.0) * 1.02)
    axes.set_xlim(left=0)
    axes.set(xlabel="CPU seconds of training", ylabel="bits per byte (lower is better)")
    axes.set_title("Python's standard library: held-out text at equal CPU time")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2)
    save_picture(figure, path)
    pyplot.close(figure)
    return True


def table(contenders: list[Contender], baselines: dict[str, float]) -> list[list[str]]:
    """Rows of the result: model, parameters, CPU seconds, steps, bits per byte."""
    rows = []
    for contender in contenders:
        progress = contender.progress
        bits = f"{progress.curve[-1][1]:.3f}" if progress.curve else ""
        rows.append(
            [contender.label, f"{contender.parameters:,}", f"{progress.seconds:.1f}", f"{progress.steps:,}", bits]
        )
    return rows + [[name, "", "", "", f"{value:.3f}"] for name, value in baselines.items()]


HEADER = ["model", "parameters", "CPU seconds", "steps", "bits per byte"]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; all but the first column flush right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def first_act(act: Any) -> list[str]:
    """What the report says of the first act; nothing if it was left out."""
    if not act.table:
        return []
    return [
        "## Learning to copy",
        "Random bytes are shown, then asked for. Each model was trained on 1 to 10 of them; it has never seen 20 or 40.",
        markdown_table(act.table[0], act.table[1:]),
        *(f"![where the memory is written and read]({picture})" for picture in act.pictures),
    ]


def write_report(
    folder: Path,
    first: Any,
    contenders: list[Contender],
    baselines: dict[str, float],
    samples: dict[str, str],
    claims: list[Claim],
    facts: dict[str, Any],
) -> Path:
    """Write REPORT.md and curves.png; returns the report's path.

    Args:
        folder: where to.
        first: the first act, with its `table` and `pictures`.
        contenders, baselines, samples: of the second.
        claims, facts: what was tested, and how it was made.
    """
    drawn = draw_curves(contenders, baselines, folder / "curves.png")
    packages = ("hf_lnlm", "torch", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    shown = "\n\n".join(f"**{label}**\n\n```python\n{text.strip()}\n```" for label, text in samples.items())
    picture = "![bits per byte against CPU seconds](curves.png)" if drawn else "No picture: pip install 'hf_lnlm[plot]'"
    lines = [
        "# hf-lnlm demo",
        *first_act(first),
        "## Language models",
        "Language models of equal size, trained for equal CPU time on Python's standard library, measured on files that "
        "none of them saw. The compressors are measured on the same files.",
        markdown_table(HEADER, table(contenders, baselines)),
        picture,
        "## Claims",
        "\n".join(f"- {'holds' if claim.holds else 'FAILS'}: {claim.text}" for claim in claims),
        "## Samples",
        shown,
        "## How it was made",
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        f"- {versions}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
    ]
    path = folder / REPORT_FILE
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path
