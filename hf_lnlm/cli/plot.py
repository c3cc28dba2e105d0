"""`hf-lnlm plot addressing`: where a Turing machine or neural computer reads and writes, as the papers draw it.

References:
    [1] Graves, Wayne, Danihelka 2014, Neural Turing Machines, arXiv 1410.5401, figures 6 and 12
    [2] Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory, Nature 538, figure 1
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.algorithmic import TASKS, Row, Task, algorithmic_task, pad_rows, wrong_bits
from ..errors import UsageProblem, unknown_name
from ..flows.algorithm import load_transducer
from ..flows.curves import draw_curves, names_of, read_curves
from ..flows.output import new_figure, plain_when_piped, quiet_libraries, save_picture, say
from ..nn.loss_heads import IGNORED

_INK, _PAPER, _BITS, _HEAT, _WRONG = "#22223b", "white", "Greys", "magma", "#e63946"
_WEIGHTINGS = {"write_weightings": "write weighting", "read_weightings": "read weighting", "usage": "usage"}
_MODES = ("backward", "content", "forward")
_ACTIVE, _MARGIN = 0.05, 2  # a slot is drawn if its weighting ever exceeds this; slots drawn around those
_ROUND, _TICKS = (
    (1, 2, 5),
    7,
)  # distances of numbered slots are these times a power of ten; at most so many have a number


@dataclass(frozen=True)
class Panel:
    """One picture of a figure, time from left to right.

    Attributes:
        title: what it shows.
        values: `(rows, length)`, from 0 to 1.
        labels: of its rows; none are written if empty.
        bits: whether its cells are bits, drawn in black and white.
        wrong: `(rows, length)` booleans, cells to mark; None for none.
    """

    title: str
    values: torch.Tensor
    labels: tuple[str, ...] = ()
    bits: bool = False
    wrong: torch.Tensor | None = None

    @property
    def numbered(self) -> bool:
        """Whether its rows are slots of the memory."""
        return bool(self.labels) and self.labels[0].isdigit()


def addressing_panels(outputs: Any, layer: int = 0, row: int = 0) -> list[Panel]:
    """Return what a layer's memory did for one row: weightings of every head, and of a neural computer usage and gates.

    Only slots that some head ever attends to are drawn, numbered as in memory.

    Args:
        outputs: of a model that was run with `output_addressing=True`.
        layer: which layer, from 0.
        row: which row of the batch.

    Raises:
        ValueError: the outputs hold no addressing.
    """
    if getattr(outputs, "read_weightings", None) is None:
        raise ValueError("outputs hold no addressing: run the model with output_addressing=True")
    found = {name: _picture(outputs, name, layer, row) for name in _WEIGHTINGS}
    slots = _active_slots(torch.cat([found["write_weightings"], found["read_weightings"]], 1))
    labels = tuple(str(slot) for slot in slots.tolist())
    panels = []
    for name, title in _WEIGHTINGS.items():
        weightings = found[name]
        for head in range(0 if weightings is None else weightings.shape[1]):
            number = f", head {head + 1}" if weightings.shape[1] > 1 else ""
            panels.append(Panel(title + number, weightings[:, head, slots].T, labels))
    return panels + _gate_panels(outputs, layer, row)


def _picture(outputs: Any, name: str, layer: int, row: int) -> Any:
    """`(length, heads, slots)`, or None if the family has no such thing."""
    layers = getattr(outputs, name, None)
    if layers is None:
        return None
    found = layers[layer][row].detach().float().cpu()
    return found[:, None] if found.dim() == 2 else found


def _active_slots(weightings: torch.Tensor) -> torch.Tensor:
    """The shortest run of slots, round the end if need be, that holds all slots which some head attends to."""
    count = weightings.shape[-1]
    active = (weightings.amax((0, 1)) > _ACTIVE).nonzero().flatten()
    if not len(active):
        return torch.arange(count)
    gaps = torch.cat([active[1:], active[:1] + count]) - active
    start = int(active[(int(gaps.argmax()) + 1) % len(active)]) - _MARGIN
    length = count - int(gaps.max()) + 1 + 2 * _MARGIN
    return torch.arange(count) if length >= count else (start + torch.arange(length)) % count


def _gate_panels(outputs: Any, layer: int, row: int) -> list[Panel]:
    """The neural computer's gates and read modes; nothing for a Turing machine."""
    if getattr(outputs, "read_modes", None) is None:
        return []
    gates, labels = [], []
    for name, label in (("write_gates", "write"), ("allocation_gates", "allocate"), ("free_gates", "free")):
        values = getattr(outputs, name)[layer][row].detach().float().cpu()
        gates.append(values.T)
        labels += [label if values.shape[1] == 1 else f"{label} {i + 1}" for i in range(values.shape[1])]
    panels = [Panel("gates", torch.cat(gates), tuple(labels))]
    modes = outputs.read_modes[layer][row].detach().float().cpu()
    for head in range(modes.shape[1]):
        number = f", head {head + 1}" if modes.shape[1] > 1 else ""
        names = _MODES if modes.shape[2] == len(_MODES) else ()
        panels.append(Panel(f"read mode{number}", modes[:, head].T, names))
    return panels


def task_panels(batch: Row, logits: torch.Tensor) -> list[Panel]:
    """Return the pictures of a task's row: what went in, what was asked for, what came out (wrong bits marked).

    Args:
        batch: one row, as `pad_rows` makes it.
        logits: `(1, length, bits)`.
    """
    inputs, labels = batch["inputs_embeds"][0], batch["labels"][0]
    asked = labels != IGNORED
    outputs = (logits[0].sigmoid() * asked).T.float()
    wrong = (((logits[0] > 0) != (labels > 0.5)) & asked).T
    return [
        Panel("inputs", inputs.T.abs().clamp(0, 1), bits=True),
        Panel("targets", (labels * asked).T, bits=True),
        Panel("outputs", outputs, bits=True, wrong=wrong),
    ]


def draw(panels: list[Panel], path: str | Path, title: str = "") -> None:
    """Draw panels one above the other into an image file.

    Args:
        panels: what to draw, of one length.
        path: file name; its ending decides the format.
        title: above the picture.

    Raises:
        ImportError: matplotlib is missing; names its extra.
        ValueError: the file name's ending is no image format.
    """
    heights = [_height(panel) for panel in panels]
    width = max(6.5, min(14.0, 0.13 * panels[0].values.shape[1] + 1.8))
    figure = new_figure(figsize=(width, sum(heights) + 0.3 * len(panels) + 0.7), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False, sharex=True)
    heated = [_draw_panel(axis, panel) for axis, panel in zip(axes[:, 0], panels, strict=True)]
    axes[-1, 0].set_xlabel("step", color=_INK, fontsize=9)
    axes[-1, 0].tick_params(bottom=True)
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    hot = [axis for axis, panel in zip(axes[:, 0], panels, strict=True) if not panel.bits]
    if hot:
        bar = figure.colorbar(heated[-1], ax=hot, fraction=0.02, pad=0.015, ticks=(0, 0.5, 1))
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7, colors=_INK, length=0)
    figure.align_ylabels(axes[:, 0])
    figure.suptitle(title, color=_INK, fontsize=11)
    save_picture(figure, Path(path), dpi=160, facecolor=_PAPER)


def _height(panel: Panel) -> float:
    """Inches: rows with names need room for them, slots may be thin."""
    rows = panel.values.shape[0]
    if panel.labels and not panel.numbered:
        return 0.15 * rows
    return 0.11 * min(12, rows) if panel.bits else max(0.6, min(2.0, 0.06 * rows))


def _round_slots(labels: tuple[str, ...]) -> list[int]:
    """Places of the slots whose numbers are written: round ones, as far apart as need be."""
    distances = (step * 10**power for power in range(9) for step in _ROUND)
    every = next(distance for distance in distances if len(labels) <= distance * _TICKS)
    return [place for place, label in enumerate(labels) if int(label) % every == 0]


def _draw_panel(axis: Any, panel: Panel) -> Any:
    """One panel; returns the image."""
    values = panel.values.numpy()
    colours = _BITS if panel.bits else _HEAT
    image = axis.imshow(values, aspect="auto", cmap=colours, vmin=0.0, vmax=1.0, interpolation="nearest")
    axis.set_title(panel.title, loc="left", fontsize=9, color=_INK, pad=3)
    shown = _round_slots(panel.labels) if panel.numbered else range(len(panel.labels))
    axis.set_yticks(list(shown), [panel.labels[i] for i in shown])
    axis.set_ylabel("slot" if panel.numbered else "bit" if panel.bits else "", color=_INK, fontsize=8)
    axis.tick_params(length=2, labelsize=7, colors=_INK, bottom=False)
    for side in axis.spines.values():
        side.set(color="#c9c9d1", linewidth=0.6)
    if panel.wrong is not None and panel.wrong.any():
        down, across = panel.wrong.nonzero(as_tuple=True)
        axis.scatter(across, down, s=14, marker="x", linewidths=1.1, color=_WRONG)
    return image


def plot_addressing(checkpoint: str, task: str, size: int | None, output: str, layer: int, seed: int) -> int:
    """Run the command: draws one row of a task and says how many bits were wrong.

    Returns:
        The exit status.

    Raises:
        ValueError: the checkpoint is no sequence transducer, its widths are not the task's, or an option is out of range.
    """
    plain_when_piped()
    check_picture_file(output)
    chosen = _task(task, size)
    new_figure()  # says at once what is missing for pictures
    with quiet_libraries():
        model = load_transducer(checkpoint)
    wanted, found = (chosen.input_size, chosen.output_size), (model.config.input_size, model.config.output_size)
    if wanted != found:
        raise UsageProblem(f"task {task!r} has inputs and outputs of width {wanted}, {checkpoint} has {found}")
    if not 0 <= layer < model.config.num_hidden_layers:
        raise UsageProblem(f"--layer must lie between 0 and {model.config.num_hidden_layers - 1}, got {layer}")
    count = size or chosen.longest
    batch = pad_rows([chosen.row(torch.Generator().manual_seed(seed), count)])
    with torch.no_grad():
        outputs = model(inputs_embeds=batch["inputs_embeds"], output_addressing=True)
    name = model.config.model_type.removeprefix("lnlm_").upper()
    panels = task_panels(batch, outputs.logits) + addressing_panels(outputs, layer)
    draw(panels, output, f"{name}: {task.replace('_', ' ')}, size {count}")
    wrong, total = int(wrong_bits(outputs.logits, batch["labels"])), int((batch["labels"] != IGNORED).sum())
    say(f"{output}: {wrong} of {total} bits wrong")
    return 0


def plot_curves(runs: list[str], output: str, metric: str | None) -> int:
    """Run the command: draws the curves of runs over each other.

    Returns:
        The exit status.

    Raises:
        ValueError: a run has no curves, or none has the metric.
    """
    plain_when_piped()
    check_picture_file(output)
    found = {name: read_curves(run) for name, run in zip(names_of(runs), runs)}
    draw_curves(found, output, metric)
    say(f"{output}: {', '.join(found)}")
    return 0


def _task(name: str, size: int | None) -> Task:
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    if size is not None and size < 1:
        raise UsageProblem(f"--size must be at least 1, got {size}")
    return algorithmic_task(name)


def check_picture_file(output: str) -> None:
    """Refuse what would fail after all the work: a folder that is missing, or no image format."""
    path = Path(output)
    if path.is_dir() or not path.parent.is_dir():
        raise UsageProblem(f"--output names a picture file in a folder that exists, got {output!r}")
    if path.suffix not in (".png", ".pdf", ".svg", ".jpg"):
        raise UsageProblem(f"--output must end in .png, .pdf, .svg or .jpg, got {output!r}")
