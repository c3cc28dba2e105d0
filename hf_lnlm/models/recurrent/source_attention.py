"""Where a recurrent decoder looks in its source: Luong's and Bahdanau's scores.

References:
    [1] Luong, Pham and Manning 2015, "Effective Approaches to Attention-based Neural Machine Translation", section 3.
    [2] Bahdanau, Cho and Bengio 2015, "Neural Machine Translation by Jointly Learning to Align and Translate", A.1.2.

Glossary: h_t: `queries`; hbar_s: `values`; W_a hbar_s: `keys`; a_t: `alignment`; c_t: `context`; D: `local_window`;
p_t: `middle`; v_a: `energy`.

Deliberate deviation: `local_p` multiplies the softmax over the window by the Gaussian, as [1] writes it, so its weights sum
to less than 1; positions are counted from 0 over real tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear, softmax

from ...nn.effective_weight import effective_weight
from ...ops.dense import Dense

MULTIPLICATIVE = ("dot", "general", "local_p")
ADDITIVE = ("concat", "additive")
ATTENTIONS = ("none", *MULTIPLICATIVE, *ADDITIVE)


class Source(NamedTuple):
    """What the decoder sees of the source.

    Attributes:
        values: `(batch, source length, encoder width)`.
        keys: `(batch, source length, key width)`.
        mask: `(batch, source length)` booleans; None if every token is real.
    """

    values: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor | None


class SourceAttention(nn.Module):
    """Alignment with the source and the context vector that follows from it.

    Args:
        config: `attention`, `attention_size`, `hidden_size`, `source_width` and `local_window` are read.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.kind, self.window = config.attention, config.local_window
        size = config.attention_size
        additive = self.kind in ADDITIVE
        self.key_width = size if additive else config.hidden_size
        self.key = None if self.kind == "dot" else Dense(config.source_width, self.key_width, bias=False)
        self.query = Dense(config.hidden_size, size, bias=False) if additive else None
        self.energy = nn.Linear(size, 1, bias=False) if additive else None
        local = self.kind == "local_p"
        self.position = Dense(config.hidden_size, size, bias=False) if local else None
        self.centre = nn.Linear(size, 1, bias=False) if local else None

    def read(self, values: torch.Tensor, mask: torch.Tensor | None) -> Source:
        """Prepare a source `(batch, source length, encoder width)` once for all steps."""
        return Source(values, values if self.key is None else self.key(values), mask)

    def forward(self, queries: torch.Tensor, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
        """Align.

        Args:
            queries: `(batch, length, hidden_size)`.
            source: what `read` made.

        Returns:
            contexts `(batch, length, encoder width)` and alignments `(batch, length, source length)`; both are zero
            for a row whose source has no real token.
        """
        scores = self._scores(queries, source)
        seen = None if source.mask is None else source.mask.unsqueeze(1)
        gaussian = None
        if self.position is not None:
            gaussian, inside = self._window(queries, source)
            seen = inside if seen is None else seen & inside
        if seen is not None:
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        alignment = softmax(scores, dim=-1)
        if seen is not None:
            alignment = alignment * seen
        if gaussian is not None:
            alignment = alignment * gaussian
        return alignment @ source.values, alignment

    def _scores(self, queries: torch.Tensor, source: Source) -> torch.Tensor:
        """Scores `(batch, length, source length)`: h_t · W_a hbar_s, or v_a · tanh(W h_t + U hbar_s)."""
        if self.query is None or self.energy is None:
            return queries @ source.keys.mT
        energy, _ = effective_weight(self.energy, source.keys.shape[-1], queries.dtype, queries.device)
        summed = torch.tanh(self.query(queries).unsqueeze(2) + source.keys.unsqueeze(1))
        return linear(summed, energy).squeeze(-1)

    def _window(self, queries: torch.Tensor, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
        """The Gaussian around p_t = S · sigmoid(v · tanh(W h_t)) of [1], eq. 9-10, and which positions are within D."""
        position: Any = self.position
        centre: Any = self.centre
        share = torch.sigmoid(centre(torch.tanh(position(queries))))
        length = source.values.shape[1]
        if source.mask is None:
            places = torch.arange(length, device=queries.device, dtype=share.dtype)
            middle = share * length
        else:
            places = (source.mask.cumsum(1) - 1).to(share.dtype).unsqueeze(1)
            middle = share * source.mask.sum(1)[:, None, None]
        distance = places - middle
        return torch.exp(-2.0 * (distance / self.window).square()), distance.abs() <= self.window
