"""What the passes of the selective scan take."""

from ..inputs import Inputs

INPUTS = Inputs(
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state,"
    " Tensor? mask, Tensor? reset",
    learned=9,
)
