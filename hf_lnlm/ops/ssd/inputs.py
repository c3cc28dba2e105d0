"""What the passes of state space duality take."""

from ..inputs import Inputs

INPUTS = Inputs(
    "Tensor x, Tensor scale, Tensor log_decay, Tensor B, Tensor C, Tensor? D, Tensor? initial_state, Tensor? diagonal,"
    " Tensor? reset",
    learned=8,
)
