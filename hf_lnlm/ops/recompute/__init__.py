"""A function whose intermediate values are not kept for the backward pass: it runs again there.

Backends: `reference` keeps everything, `eager` keeps the arguments only.
"""

from ..backend import Operation
from .eager import recomputed
from .reference import recomputed_reference

__all__ = ["RECOMPUTE", "recomputed"]

RECOMPUTE = Operation("recompute", reference=recomputed_reference, eager=recomputed)
