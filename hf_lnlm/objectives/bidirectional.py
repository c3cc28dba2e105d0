"""Bidirectional language modelling: one model predicts the next token, another the one before, and they share words.

[1] Peters et al. 2018, "Deep contextualized word representations" (ELMo), §3.1 (biLM), §3.4 (perplexity of both).

The models and the loss are in `models.composed.modeling_bidirectional`; a model that has both directions itself (ELMo)
brings its own, and then words are counted, not tokens. Rows are those of causal language modelling:
they overlap in one token, so that the forward direction predicts every token of the text once (and the backward one too).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .base import IGNORED, Collator, Direction, Objective, token_sums
from .causal import CausalCollator


@dataclass(frozen=True)
class BidirectionalObjective(Objective):
    """Predicts each token from those before it and, by another model or direction, from those behind it."""

    name: ClassVar[str] = "bidirectional"
    title: ClassVar[str] = "Forward and backward language modelling"
    paper: ClassVar[str] = "Peters et al. 2018"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    direction: ClassVar[Direction] = "forward"
    composed_type: ClassVar[str] = "lnlm_bidirectional"
    logs_metrics: ClassVar[bool] = True
    shifted: ClassVar[bool] = True
    batches: ClassVar[type[Collator]] = CausalCollator

    @classmethod
    def learns(cls, config: Any) -> bool:
        """Whether models of this configuration read forward, or are a language model both ways."""
        return _both_ways(config) or super().learns(config)

    @classmethod
    def composes(cls, config: Any) -> bool:
        """Whether two models are made of this configuration."""
        return super().composes(config) and not _both_ways(config)

    @classmethod
    def loader(cls, config: Any) -> str:
        """The Auto class that loads a trained model of this configuration."""
        return "AutoModelForPreTraining" if _both_ways(config) else super().loader(config)

    def build(self, config: Any) -> Any:
        """Both models with fresh weights.

        Args:
            config: That of each of them, or of a model that has both directions.
        """
        if _both_ways(config):
            import transformers

            return transformers.AutoModelForPreTraining.from_config(config)
        from ..models.composed.modeling_bidirectional import BidirectionalForPreTraining, compose

        return BidirectionalForPreTraining(config) if config.model_type == self.composed_type else compose(config)

    def takes_streams(self, model: Any) -> bool:
        """Never: the backward direction has no state to carry on."""
        return False

    def packing(self, tokenizer: Any, length: int) -> dict[str, Any]:
        """Rows of `length` tokens that repeat one token."""
        return {"length": length, "overlap": 1}

    def logits(self, outputs: Any) -> Any:
        """All outputs: both directions are measured."""
        return outputs

    def sums(self, logits: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a batch adds to the metrics.

        Args:
            logits: The model's outputs (see `logits`).
            batch: The collator's batch.
        """
        if logits.get("counts") is not None:
            return _counted(logits, batch)
        labels = batch["labels"]
        found = super().sums(logits["logits"], batch)
        back, before = logits["backward_logits"][:, 1:], labels[:, :-1]
        # what is before a row's first real token isn't predicted, and padding isn't either
        counted = (before != IGNORED) & (labels[:, 1:] != IGNORED)
        behind = token_sums(back[counted], before[counted])
        return {**found, **{f"backward_{name}": value for name, value in behind.items()}}

    def summary(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Metrics of added-up sums: of each direction as in causal modelling, `loss` the mean of both."""
        known = "correct" in sums  # a model that never makes its logits while training can't tell
        sums = {"correct": math.nan, "backward_correct": math.nan, **sums}
        ahead = super().summary({name: sums[name] for name in ("nll", "tokens", "correct", "bytes") if name in sums})
        back = super().summary({name: sums[f"backward_{name}"] for name in ("nll", "tokens", "correct")})
        loss = (ahead["loss"] + back["loss"]) / 2
        sides, kinds = {"forward": ahead, "backward": back}, ("loss", "accuracy") if known else ("loss",)
        each = {f"{side}_{name}": found[name] for side, found in sides.items() for name in kinds}
        more = {"bits_per_byte": ahead["bits_per_byte"]} if "bits_per_byte" in ahead else {}
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **each, **more}


def _both_ways(config: Any) -> bool:
    """Whether one model of this configuration is a language model in both directions."""
    return bool(getattr(config, "predicts_both_ways", False))


def _counted(outputs: Mapping[str, Any], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums of a model that counts itself: its output has `sums`, `counts` and `correct`, `(2,)` each."""
    found: dict[str, Tensor] = {}
    for direction, prefix in enumerate(("", "backward_")):
        for name, ours in (("nll", "sums"), ("tokens", "counts"), ("correct", "correct")):
            if outputs.get(ours) is not None:
                found[prefix + name] = outputs[ours][direction].double()
    return {**found, "bytes": batch["num_bytes"].sum().double()} if "num_bytes" in batch else found
