"""What the passes of the causal convolution take."""

import torch

from ..inputs import Inputs

INPUTS = Inputs(
    "Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? gather_index",
    learned=4,
    marks=torch.int64,
)
