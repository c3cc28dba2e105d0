"""The tensors of an operation, in the order in which its backends take them."""

from __future__ import annotations

from typing import Any

import torch


class Inputs:
    """Names and types of an operation's tensors; the passes of its backends take them first, then options.

    Args:
        schema: as `torch.library` wants it, such as `"Tensor x, Tensor? bias"`: those with gradients first.
        learned: how many have gradients.
        marks: type of the others.
    """

    def __init__(self, schema: str, learned: int, marks: torch.dtype = torch.bool) -> None:
        self.schema, self.marks = schema, marks
        self.names = tuple(tensor.split()[1] for tensor in schema.split(", "))
        self.learned = self.names[:learned]

    def split(self, values: tuple[Any, ...]) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """Return a pass's tensors by name, absent ones None, and its options."""
        return dict(zip(self.names, values)), values[len(self.names) :]
