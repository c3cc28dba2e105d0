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
import torch

from .base import (
    IGNORED,
    Batch,
    Direction,
    Objective,
    Row,
    bookkeeping_columns,
    pad_id,
    pad_rows,
    present,
    require_labels,
)


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

    boundaries: bool = False

    def packing(self, tokenizer: Any, length: int) -> dict[str, Any]:
        """Rows of `length` tokens that repeat one token, so that every token of the text is predicted once."""
        return {"length": length, "overlap": 1, "boundaries": self.boundaries}

    def collator(self, tokenizer: Any, seed: int = 0, *, bookkeeping: bool = False) -> CausalCollator:
        """Makes batches; nothing is random, so the seed has no effect."""
        return CausalCollator(tokenizer, bookkeeping)


@dataclass(frozen=True)
class CausalCollator:
    """Rows → `input_ids`, `labels` `[batch, tokens]`, and what the rows ask for.

    Rows with `next_id` (lanes: the token behind the window, −100 if there is none) also give `shift_labels`
    `[batch, tokens]`, labels already moved to the position that predicts them, which take precedence over `labels`.

    Args:
        tokenizer: Gives the pad token.
        bookkeeping: Adds `num_bytes` and `reset` `[batch]`, as far as rows have them.
    """

    tokenizer: Any
    bookkeeping: bool = False

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Makes a batch.

        Raises:
            ValueError: No label counts, as when every row has one token.
        """
        mask = present(rows)
        ids = pad_rows([row["input_ids"] for row in rows], pad_id(self.tokenizer, mask is not None))
        labels = ids if mask is None else np.where(mask, ids, IGNORED)
        arrays = {"input_ids": ids}
        if "position_ids" in rows[0]:
            arrays["position_ids"] = pad_rows([row["position_ids"] for row in rows], 0)
            starts = arrays["position_ids"] == 0
            labels = np.where(starts, IGNORED, labels)
        arrays["labels"] = labels
        if "next_id" in rows[0]:
            last = np.array([[row["next_id"]] for row in rows], np.int64)
            arrays["shift_labels"] = np.concatenate([labels[:, 1:], last], axis=1)
        if mask is not None:
            arrays["attention_mask"] = mask.astype(np.int64)
        predicted = arrays.get("shift_labels", labels[:, 1:])
        require_labels(predicted, ids.size, "rows of one token predict nothing; use longer rows")
        batch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return {**batch, **bookkeeping_columns(rows, self.bookkeeping)}
