"""Run an encoder that reads padding on rows of equal length together, so that there is no padding to read.

Most encoders mask padding in their attention and never see it otherwise. One with convolutions inside (ConvBERT) does: a
text's states then depend on the texts it is batched with. Grouping rows by their length makes them those of the text alone,
for one run of the encoder a distinct length.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutput

READ_PADDING = frozenset({"convbert"})
"""Model types whose states depend on padding."""


def run_by_length(encoder: Any, inputs: dict[str, Any], lengths: torch.Tensor, width: int) -> BaseModelOutput:
    """Encode a batch, rows of equal length at a time.

    Args:
        encoder: called with the rows' part of `inputs` and no mask.
        inputs: the encoder's arguments; tensors `(batch, width, …)` are cut to a group's rows and length.
        lengths: `(batch,)` real tokens of each row, which come first. A row without any is run on its first position.
        width: positions of the batch.

    Returns:
        last hidden state `(batch, width, channels)` and, if asked for, hidden states and attentions; zero at padding.
    """
    batch = lengths.shape[0]
    found: list[tuple[torch.Tensor, Any]] = []
    for length in lengths.clamp(min=1).unique().tolist():
        rows = (lengths.clamp(min=1) == length).nonzero()[:, 0]
        found.append(
            (rows, encoder(**{name: _part(value, rows, length, (batch, width)) for name, value in inputs.items()}))
        )
    hidden = [(rows, outputs.last_hidden_state) for rows, outputs in found]
    return BaseModelOutput(
        last_hidden_state=_joined(hidden, batch, width),
        hidden_states=_joined_layers(found, "hidden_states", batch, width),
        attentions=_joined_layers(found, "attentions", batch, width),
    )


def _part(value: Any, rows: torch.Tensor, length: int, shape: tuple[int, int]) -> Any:
    """A group's share of an argument; of one that is the same for all rows, its beginning."""
    if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[1] != shape[1]:
        return value
    return value[rows, :length] if value.shape[0] == shape[0] else value[:, :length]


def _joined(parts: list[tuple[torch.Tensor, torch.Tensor]], batch: int, width: int) -> torch.Tensor:
    """Put the groups' rows in their places: `(rows, length, channels)` or `(rows, heads, length, length)`."""
    places = torch.cat([rows for rows, _ in parts])
    padded = [F.pad(values, _missing(values, width)) for _, values in parts]
    return torch.cat(padded)[places.argsort()[:batch]]


def _missing(values: torch.Tensor, width: int) -> tuple[int, ...]:
    if values.dim() == 3:
        return (0, 0, 0, width - values.shape[1])
    return (0, width - values.shape[3], 0, width - values.shape[2])


def _joined_layers(found: list[tuple[torch.Tensor, Any]], name: str, batch: int, width: int) -> Any:
    layers = [outputs.get(name) for _, outputs in found]
    if any(layer is None for layer in layers):
        return None
    rows = [places for places, _ in found]
    return tuple(None if group[0] is None else _joined(list(zip(rows, group)), batch, width) for group in zip(*layers))
