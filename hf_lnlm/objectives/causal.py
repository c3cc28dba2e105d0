"""Causal language modelling: predict every token from those before it.

[1] Bengio et al. 2003, "A neural probabilistic language model"; Radford et al. 2019, "Language models are unsupervised
    multitask learners".

Labels are hidden by the rows' masks, never by the pad token's id, so a model whose pad token is its end token still
learns to stop. Loss per token: −log p(token | tokens before).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .base import IGNORED, Collator, Direction, Objective, Row, pad_rows, require_labels


class CausalCollator(Collator):
    """Rows → `input_ids`, `labels` `(batch, tokens)`, and what the rows ask for; nothing is random.

    Rows with `next_id` (streams: the token behind the window, −100 if there is none) also give `shift_labels`
    `(batch, tokens)`, labels already moved to the position that predicts them, which take precedence over `labels`.
    """

    def arrays(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """Ids and labels; rows that all have one token are refused."""
        ids, mask, extra = self.padded(rows)
        labels = ids if mask is None else np.where(mask, ids, IGNORED)
        if "position_ids" in rows[0]:
            extra["position_ids"] = pad_rows([row["position_ids"] for row in rows], 0)
            labels = np.where(extra["position_ids"] == 0, IGNORED, labels)
        if "next_id" in rows[0]:
            last = np.array([[row["next_id"]] for row in rows], np.int64)
            extra["shift_labels"] = np.concatenate([labels[:, 1:], last], axis=1)
        predicted = extra.get("shift_labels", labels[:, 1:])
        require_labels(predicted, ids.size, "rows of one token predict nothing; use longer rows")
        return {"input_ids": ids, "labels": labels, **extra}


@dataclass(frozen=True)
class CausalObjective(Objective):
    """Predicts each token from the tokens before it.

    Args:
        boundaries: Keeps packed documents apart: rows get `position_ids` that restart at every document, for models
            that reset their state (or mask their attention) there, and no document's first token is predicted.
    """

    name: ClassVar[str] = "causal"
    title: ClassVar[str] = "Causal language modelling"
    paper: ClassVar[str] = "Bengio et al. 2003; Radford et al. 2019"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    direction: ClassVar[Direction] = "forward"
    shifted: ClassVar[bool] = True
    batches: ClassVar[type[Collator]] = CausalCollator

    boundaries: bool = False

    def packing(self, tokenizer: Any, length: int) -> dict[str, Any]:
        """Rows of `length` tokens that repeat one token, so that every token of the text is predicted once."""
        return {"length": length, "overlap": 1, "boundaries": self.boundaries}
