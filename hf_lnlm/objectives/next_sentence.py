"""Next-sentence prediction: does B follow A, or is it from another document? Jointly with masked language modelling.

[1] Devlin et al. 2019, "BERT: Pre-training of deep bidirectional transformers", §3.1, task 2, and appendix A.2.

Label 0: B is what follows A; label 1: B is from another document, half the time. Rows and masks: `sentence_pairs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .sentence_pairs import Part, SentencePairObjective


@dataclass(frozen=True)
class NextSentenceObjective(SentencePairObjective):
    """Masked language modelling with next-sentence prediction (BERT); see the base for its options."""

    name: ClassVar[str] = "next_sentence"
    title: ClassVar[str] = "Masked language modelling and next-sentence prediction"
    paper: ClassVar[str] = "Devlin et al. 2019"
    label: ClassVar[str] = "next_sentence_label"
    needs_others: ClassVar[bool] = True

    def pair(self, first: Part, second: Part, other: Part | None, changed: bool) -> tuple[Part, Part]:
        """A and what follows it, or A and text of another document; see the base."""
        return (first, other) if changed and other is not None else (first, second)
