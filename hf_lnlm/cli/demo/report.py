"""What the demo leaves behind: the table, the curves as a picture, and REPORT.md."""

from __future__ import annotations

import gzip
import lzma
import platform
import threading
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from ...flows.curves import draw_line, dress, name_ends, style_of
from ...flows.output import new_figure, save_picture
from .race import Contender

REPORT_FILE = "REPORT.md"
PICTURE = "curves.png"


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


class PeakMemory:
    """The most memory that this process and those it has started took together, looked at four times a second."""

    def __init__(self) -> None:
        self.most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def gibibytes(self) -> float:
        """Peak so far, in GiB; pages that several processes share count for each."""
        return self.most / 2**30

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._over.wait(0.25):
            found, started = own.memory_info().rss, own.children(recursive=True)
            for process in started:
                with suppress(psutil.Error):  # it has just ended
                    found += process.memory_info().rss
            self.most = max(self.most, found)


def draw_curves(contenders: list[Contender], baselines: dict[str, float], path: Path) -> bool:
    """Draw bits per byte against CPU seconds.

    Returns:
        Whether matplotlib (extra `plot`) was there to do it.
    """
    try:
        figure = new_figure(figsize=(9, 5.2), dpi=120)
    except ImportError:
        return False
    axes = figure.add_axes((0.08, 0.1, 0.7, 0.8))
    ends = []
    for number, contender in enumerate(contenders):
        curve = contender.progress.curve
        draw_line(axes, number, curve, linewidth=2)
        ends.append((f"{contender.label}  {curve[-1][1]:.2f}", curve[-1][1], style_of(number)["color"]))
    for name, value in baselines.items():
        axes.axhline(value, color="0.6", linestyle=(0, (1, 3)), linewidth=1)
        ends.append((f"{name}  {value:.2f}", value, "0.45"))
    heights = [bits for contender in contenders for _, bits in contender.progress.curve] + [*baselines.values()]
    room = 0.04 * (max(heights) - min(heights))
    axes.set_ylim(min(heights) - room, max(heights) + room)
    axes.set_xlim(0, max(contender.progress.curve[-1][0] for contender in contenders))
    axes.set_ylabel("bits per byte (lower is better)", fontsize=9)
    axes.set_title("Python's standard library: held-out text at equal CPU time", loc="left", fontsize=11)
    dress(axes, "CPU seconds of training")
    name_ends(axes, ends)
    save_picture(figure, path)
    return True


def table(contenders: list[Contender], baselines: dict[str, float]) -> list[list[str]]:
    """Rows of the result, the best first: model, parameters, CPU seconds, steps, bits per byte."""
    rows = [(value, [name, "", "", ""]) for name, value in baselines.items()]
    for contender in contenders:
        progress = contender.progress
        row = [contender.label, f"{contender.parameters:,}", f"{progress.seconds:.1f}", f"{progress.steps:,}"]
        rows.append((progress.curve[-1][1], row))
    return [[*row, f"{bits:.3f}"] for bits, row in sorted(rows)]


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
    drawn = draw_curves(contenders, baselines, folder / PICTURE)
    packages = ("hf_lnlm", "torch", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    shown = "\n\n".join(f"**{label}**\n\n```python\n{text.strip()}\n```" for label, text in samples.items())
    picture = f"![bits per byte against CPU seconds]({PICTURE})" if drawn else "No picture: pip install 'hf_lnlm[plot]'"
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
