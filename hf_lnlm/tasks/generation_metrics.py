"""What a model writes, rated against what it should have written: exact, BLEU, chrF and ROUGE-L, by sacrebleu's and
rouge_score's own code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..objectives.base import IGNORED


def written_metrics(guesses: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """`exact_written`, a share of 1; `bleu` and `chrf`, 0 … 100 over the corpus; `rouge_l`, mean F1 of 1.

    Raises:
        ImportError: the extra `eval` is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu import corpus_bleu, corpus_chrf
    except ModuleNotFoundError as error:
        raise ImportError(
            "rating written texts needs sacrebleu and rouge_score: pip install 'hf_lnlm[eval]'"
        ) from error
    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score(fact, guess)["rougeL"].fmeasure for guess, fact in zip(guesses, wanted)]
    return {
        "exact_written": float(np.mean([guess.strip() == fact.strip() for guess, fact in zip(guesses, wanted)])),
        "bleu": float(corpus_bleu(list(guesses), [list(wanted)]).score),
        "chrf": float(corpus_chrf(list(guesses), [list(wanted)]).score),
        "rouge_l": float(np.mean(rouge)),
    }


@dataclass(frozen=True)
class WrittenMetrics:
    """Trainer's `compute_metrics` for generated ids.

    Args:
        tokenizer: turns ids into text.
    """

    tokenizer: Any

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Metrics of `prediction.predictions` and `prediction.label_ids`, integers `(rows, tokens)`."""
        return written_metrics(self._texts(prediction.predictions), self._texts(prediction.label_ids))

    def _texts(self, ids: Any) -> list[str]:
        known = np.where(np.asarray(ids) == IGNORED, self.tokenizer.pad_token_id, ids)
        return self.tokenizer.batch_decode(known, skip_special_tokens=True)


def generation_fields(num_beams: int, max_new_tokens: int) -> dict[str, Any]:
    """Training arguments that make evaluation write; a decoder begins with one token of its own."""
    return {
        "predict_with_generate": True,
        "generation_num_beams": num_beams,
        "generation_max_length": max_new_tokens + 1,
        "prediction_loss_only": False,
    }
