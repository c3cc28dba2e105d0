"""What next-sentence prediction and sentence-order prediction have in common: rows `<cls> A <sep> B <sep>`, masked.

[1] Devlin et al. 2019, "BERT: Pre-training of deep bidirectional transformers", §3.1 and appendix A.2.
[2] Lan et al. 2020, "ALBERT: A lite BERT", §3.1.

A and B are the two parts of a chunk of consecutive segments (hf_lnlm/data/pairs.py), cut at a random segment; a chunk of a
single segment is cut at a random token, so that a pair that claims to be of one document always is (the authors' code
falls back on a random document there, in [2] too). Half the pairs are changed: what that means is each objective's own.
A pair too long loses tokens of its longer part, from the front or the back at random. Masks as in `masked`, jointly: the
loss is that of the masked tokens plus that of the pair.

Models: the pre-training head that transformers has for the family (BERT and its kin for next sentences, ALBERT for their
order), else a masked language model with a pooler of its own (`models.composed`), for any encoder.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional

from ..data.pairs import SegmentPairs
from ..nn.loss_heads import IGNORED
from .base import Collator, Direction, Objective, Row, pad_rows
from .families import accepts
from .masked import MaskedCollator, MaskedObjective, require_mask_token

FRAME = 3
"""Special tokens of a row: cls and two sep."""


@dataclass(frozen=True)
class Part:
    """A piece of text: ids and, where words matter, word numbers, both `(tokens,)`."""

    ids: np.ndarray
    words: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, begin: int, end: int) -> Part:
        """Tokens from `begin` to before `end`."""
        return Part(self.ids[begin:end], self.words[begin:end])


@dataclass
class PairCollator(Collator):
    """Rows of `SegmentPairs` → `input_ids` with masks, `token_type_ids`, `attention_mask`, `labels` `(batch, tokens)` and
    the pairs' labels `(batch,)`.
    """

    def __post_init__(self) -> None:
        self.masks = MaskedCollator(self.objective.masking(), self.tokenizer, self.seed)

    def arrays(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """Pairs, masked; refused as by `masked`."""
        made = [self._row(row) for row in rows]
        return {
            **self.masks.arrays(made),
            "token_type_ids": pad_rows([row["token_type_ids"] for row in made], 0),
            "attention_mask": pad_rows([np.ones(len(row["input_ids"]), np.int64) for row in made], 0),
            self.objective.label: np.array([row["pair_label"] for row in made]),
        }

    def _row(self, row: Row) -> dict[str, Any]:
        random = self.random(row, self.objective.name)
        changed = bool(random.random() < self.objective.changed_share)
        whole, other = self._part(row, ""), None
        at = cut_place(np.asarray(row["segments"]), len(whole), random)
        if self.objective.needs_others:
            other = whole_segments(self._part(row, "other_"), row["other_segments"], len(whole) - at, random)
        first, second = self.objective.pair(whole.cut(0, at), whole.cut(at, len(whole)), other, changed)
        first, second = shortened(first, second, len(whole), random)
        cls, sep = [self.tokenizer.cls_token_id], [self.tokenizer.sep_token_id]
        made = {"epoch": row.get("epoch", 0), "example_id": row["example_id"], "pair_label": int(changed)}
        made["input_ids"] = np.concatenate([cls, first.ids, sep, second.ids, sep])
        made["word_ids"] = np.concatenate([[-1], first.words, [-1], second.words, [-1]])
        made["token_type_ids"] = np.repeat([0, 1], [len(first) + 2, len(second) + 1])
        return made

    def _part(self, row: Row, prefix: str) -> Part:
        ids = np.asarray(row[f"{prefix}ids" if prefix else "input_ids"], np.int64)
        words = row.get(f"{prefix}word_ids")
        return Part(ids, np.full(len(ids), -1) if words is None else np.asarray(words))


@dataclass(frozen=True)
class SentencePairObjective(Objective):
    """Base of the objectives on pairs.

    Args:
        rate: Share of tokens masked, between 0 and 1.
        whole_word: Masks words with all their pieces.
        spans: `none`, `ngram` (ALBERT) or `geometric` (SpanBERT); see `masked`.
        changed_share: Share of the pairs that are changed.
    """

    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    direction: ClassVar[Direction] = "both"
    composed_type: ClassVar[str] = "lnlm_sentence_pair"
    batches: ClassVar[type[Collator]] = PairCollator
    label: ClassVar[str]
    """Name of the pair's label in `forward` of the stock heads."""
    needs_others: ClassVar[bool] = False
    """Whether rows bring text of another document."""
    logs_metrics: ClassVar[bool] = True

    rate: float = 0.15
    whole_word: bool = False
    spans: str = "none"
    changed_share: float = 0.5

    def __post_init__(self) -> None:
        self.masking()
        if not 0 < self.changed_share < 1:
            raise ValueError(f"changed_share must lie between 0 and 1 (exclusive), got {self.changed_share}")

    def masking(self) -> MaskedObjective:
        """How tokens are masked."""
        return MaskedObjective(rate=self.rate, whole_word=self.whole_word, spans=self.spans)  # type: ignore[arg-type]

    @classmethod
    def has_stock_head(cls, config: Any) -> bool:
        """Whether transformers has a head for both losses."""
        return accepts(config, "AutoModelForPreTraining", "labels", cls.label)

    @classmethod
    def composes(cls, config: Any) -> bool:
        """Whether a pooler has to be added to a masked language model."""
        return super().composes(config) and not cls.has_stock_head(config)

    @classmethod
    def loader(cls, config: Any) -> str:
        """Always the Auto class of pre-training heads."""
        return "AutoModelForPreTraining"

    def check(self, config: Any, tokenizer: Any) -> None:
        """See `Objective.check`; a model made for the other relation of pairs is refused too."""
        if config.model_type == self.composed_type and config.label != self.label:
            raise ValueError(
                f"objective {self.name!r} needs a model with {self.label}, and this one was made with {config.label}"
            )
        super().check(config, tokenizer)

    def build(self, config: Any) -> Any:
        """A model with fresh weights: the stock pre-training head, or a masked language model with a pooler."""
        from transformers import AutoModelForPreTraining

        from ..models.composed.modeling_sentence_pair import compose

        if self.composes(config):
            return compose(config, self.label)
        return AutoModelForPreTraining.from_config(config)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer without mask, cls or sep token."""
        require_mask_token(self.name, tokenizer)
        for name in ("cls", "sep"):
            if getattr(tokenizer, f"{name}_token_id") is None:
                raise ValueError(f"objective {self.name!r} needs a {name} token: set tokenizer.{name}_token")

    def rows(self, documents: Any, tokenizer: Any, length: int, **options: Any) -> SegmentPairs:
        """Chunks of consecutive segments; how documents are framed doesn't matter.

        Raises:
            ValueError: A stream, or too little text.
        """
        options = {"words": self.masking().by_words, "others": self.needs_others}
        return SegmentPairs(documents, tokenizer, length - FRAME, **options)

    @abstractmethod
    def pair(self, first: Part, second: Part, other: Part | None, changed: bool) -> tuple[Part, Part]:
        """The two parts of a row.

        Args:
            first, second: Consecutive parts of a document.
            other: Text of another document, if rows bring it.
            changed: Whether the pair is to be changed; its label.
        """

    def logits(self, outputs: Any) -> Any:
        """Logits of the masked tokens `(batch, tokens, vocabulary)` and of the pairs `(batch, 2)`."""
        named = ("seq_relationship_logits", "sop_logits")
        return outputs["prediction_logits"], next(outputs[name] for name in named if name in outputs)

    def sums(self, logits: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a batch adds to the metrics: those of `masked`, and `pairs`, `pair_nll`, `pair_correct`.

        Args:
            logits: See `logits`.
            batch: The collator's batch.
        """
        words, relation = logits
        labels = batch[self.label]
        nll = functional.cross_entropy(relation.float(), labels, reduction="sum", ignore_index=IGNORED).double()
        found = {"pair_nll": nll, "pair_correct": (relation.argmax(-1) == labels).sum().double()}
        return {**super().sums(words, batch), **found, "pairs": (labels != IGNORED).sum().double()}

    def summary(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Metrics of added-up sums: `masked_loss`, `masked_accuracy`, `perplexity`, `pair_loss`, `pair_accuracy`."""
        own = {name: sums[name] for name in ("nll", "tokens", "correct")}
        masked, pairs = super().summary(own), max(float(sums["pairs"]), 1.0)
        return {
            "loss": masked["loss"] + float(sums["pair_nll"]) / pairs,
            "perplexity": masked["perplexity"],
            "masked_loss": masked["loss"],
            "masked_accuracy": masked["accuracy"],
            "pair_loss": float(sums["pair_nll"]) / pairs,
            "pair_accuracy": float(sums["pair_correct"]) / pairs,
        }


def whole_segments(part: Part, segments: Any, room: int, random: np.random.Generator) -> Part:
    """Segments of a chunk from one in its first half on, as many as fit, so that no cut mark betrays a random pair.

    Args:
        part: The chunk.
        segments: Where its segments begin.
        room: Tokens that there is room for; the first segment is taken even if it has more.
        random: Where the number comes from.
    """
    borders = np.append(np.asarray(segments), len(part))
    start = int(random.integers(len(borders) // 2))
    stop = int(np.searchsorted(borders, borders[start] + room, side="right")) - 1
    return part.cut(int(borders[start]), int(borders[max(start + 1, stop)]))


def cut_place(segments: np.ndarray, tokens: int, random: np.random.Generator) -> int:
    """Where a chunk is cut in two: where one of its segments begins, or anywhere if there is only one.

    Args:
        segments: Where its segments begin, `(segments,)`.
        tokens: Its length, 2 or more.
        random: Where the number comes from.
    """
    inner = segments[(segments > 0) & (segments < tokens)]
    return int(inner[random.integers(len(inner))]) if len(inner) else int(random.integers(1, tokens))


def shortened(first: Part, second: Part, length: int, random: np.random.Generator) -> tuple[Part, Part]:
    """Cut tokens off the longer part, at its front or back, until both have `length` tokens at most."""
    parts = [first, second]
    while len(parts[0]) + len(parts[1]) > length:
        longer = int(len(parts[1]) > len(parts[0]))
        begin = int(random.random() < 0.5)
        parts[longer] = parts[longer].cut(begin, len(parts[longer]) - 1 + begin)
    return parts[0], parts[1]
