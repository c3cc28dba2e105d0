"""Memory-augmented families: the Neural Turing Machine and the Differentiable Neural Computer."""
