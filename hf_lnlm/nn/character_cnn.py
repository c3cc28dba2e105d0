"""Vectors of words from their spelling: convolutions over characters, the maximum of each map, highways, a projection.

References:
    [1] Kim, Jernite, Sontag and Rush 2016, "Character-Aware Neural Language Models", section 2.2 and 2.3.
    [2] Jozefowicz et al. 2016, "Exploring the Limits of Language Modeling", section 3.2 (`CNN inputs`).
    [3] Peters et al. 2018, "Deep contextualized word representations" (ELMo), section 3.4.

Glossary ([1]: variable): t, transform gate: `gate`; g(W_H y + b_H): `transform`. As in [3] the activation comes after the
maximum over time, which for a rising function is the same and cheaper.

Complexity: O(words * (W * sum(k * d * n) + highways * N^2)), N = sum(n) maps.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .convolution import TimeConvolution

CHUNK = 512  # words at a time where no gradient is wanted: a map has words * W numbers

ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


class Highway(nn.Module):
    """`y = g * relu(W x + b) + (1 - g) * x` with `g = sigmoid(W' x + b')` ([1], eq. 8).

    Args:
        width: of x and y.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Run the layer on `(words, width)`."""
        return torch.lerp(features, self.transform(features).relu(), self.gate(features).sigmoid())


class CharacterCNN(nn.Module):
    """Word vectors from embedded characters.

    Args:
        char_width: width of a character's embedding, d.
        filters: `(k, n)` pairs: places that a window sees, and maps of that size.
        num_highways: highway layers.
        activation: `relu` or `tanh`.
        output_size: width of a word's vector.
    """

    def __init__(
        self, char_width: int, filters: Sequence[tuple[int, int]], num_highways: int, activation: str, output_size: int
    ) -> None:
        super().__init__()
        self.activation = activation
        self.convolutions = nn.ModuleList(TimeConvolution(char_width, maps, size) for size, maps in filters)
        width = sum(maps for _, maps in filters)
        self.highways = nn.ModuleList(Highway(width) for _ in range(num_highways))
        self.projection = nn.Linear(width, output_size)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """Return vectors `(words, output_size)` of spellings `(words, W, char_width)`."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or len(characters) <= CHUNK:
            return self._encoded(characters)
        return torch.cat([self._encoded(part) for part in characters.split(CHUNK)])

    def _encoded(self, characters: torch.Tensor) -> torch.Tensor:
        frames, activate = characters.mT, ACTIVATIONS[self.activation]
        features = torch.cat([activate(layer(frames).amax(-1)) for layer in self.convolutions], -1)
        for highway in self.highways:
            features = highway(features)
        projected: torch.Tensor = self.projection(features)
        return projected
