"""Layers with a memory as operations: the Neural Turing Machine and the Differentiable Neural Computer."""
