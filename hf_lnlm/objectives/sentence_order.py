"""Sentence-order prediction: are two consecutive pieces of text in their order? Jointly with masked language modelling.

[1] Lan et al. 2020, "ALBERT: A lite BERT for self-supervised learning of language representations", §3.1.

Label 0: A then B, as in the document; label 1: B then A, half the time. Both are always of one document: what tells the
order is coherence, not topic. ALBERT masks n-grams (`spans: ngram`). Rows and masks: `sentence_pairs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .sentence_pairs import Part, SentencePairObjective


@dataclass(frozen=True)
class SentenceOrderObjective(SentencePairObjective):
    """Masked language modelling with sentence-order prediction (ALBERT); see the base for its options."""

    name: ClassVar[str] = "sentence_order"
    title: ClassVar[str] = "Masked language modelling and sentence-order prediction"
    paper: ClassVar[str] = "Lan et al. 2020"
    label: ClassVar[str] = "sentence_order_label"

    def pair(self, first: Part, second: Part, other: Part | None, changed: bool) -> tuple[Part, Part]:
        """The two parts in their order or swapped; see the base."""
        return (second, first) if changed else (first, second)
