"""Replaced-token detection: a small generator fills masks, and the model finds which tokens it got wrong.

[1] Clark et al. 2020, "ELECTRA: Pre-training text encoders as discriminators rather than generators", §2 (method), §3.1
    and appendix A (sizes, rates, weights).

A share `rate` of a row's tokens is chosen, never a special one; 85 % of the chosen are masked and 15 % left as they are,
and the generator predicts all of them. The discriminator reads the row with the generator's samples in the chosen
places and says of every token but padding whether it was replaced. The models and the loss are in
`models.composed.modeling_replaced_token`; the batch brings masks, labels and the numbers that samples are drawn with,
all a function of (seed, epoch, example_id).

Metrics, from sums over batches and processes: loss (nats) and accuracy of both, the share of tokens replaced, and the
area under the discriminator's ROC curve, from histograms of its logits.

Deviations from the authors' code: places are drawn without replacement, and their number is `rate · tokens` rounded at
random so that its mean is exact; every example's noise is its own, so that a resumed run repeats it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .base import IGNORED, Collator, Direction, Objective, Row
from .families import direction_of, has_head
from .masked import MaskedCollator, MaskedObjective, framed, require_mask_token

BINS, SPAN = 4096, 16.0
"""Bins of the histograms of logits, and the largest logit told apart."""


@dataclass
class ReplacedTokenCollator(MaskedCollator):
    """Rows → `input_ids` with masks, `labels` and `uniforms` `(batch, tokens)`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options = self.objective
        self.objective = MaskedObjective(rate=options.rate, mask_share=options.mask_share, random_share=0.0)

    def arrays(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """Ids with masks, labels and the numbers that samples are drawn with; refused are rows of special tokens only."""
        drawn = [self.random(row, "replaced_token").random(len(row["input_ids"]), np.float32) for row in rows]
        longest = max(map(len, drawn))
        noise = np.stack([np.pad(row, (0, longest - len(row))) for row in drawn])
        return {**super().arrays(rows), "uniforms": noise}


@dataclass(frozen=True)
class ReplacedTokenObjective(Objective):
    """Generator and discriminator (ELECTRA).

    Args:
        rate: Share of tokens chosen, between 0 and 1 ([1]: 0.15, large models 0.25).
        mask_share: Share of the chosen that the mask token replaces; the others stay ([1]'s code: 0.85).
        generator_fraction: Width of the generator over the discriminator's, in (0, 1] ([1], §3.2: ¼ to ½).
        generator: Fields of the generator's configuration where they differ; with `model_type` another family.
        share_embeddings: One embedding for both, projected where their widths differ.
        temperature: Of the generator's samples, above 0.
        weight: Of the discriminator's loss ([1]: 50).
    """

    name: ClassVar[str] = "replaced_token"
    title: ClassVar[str] = "Replaced-token detection"
    paper: ClassVar[str] = "Clark et al. 2020"
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    direction: ClassVar[Direction] = "both"
    composed_type: ClassVar[str] = "lnlm_replaced_token"
    batches: ClassVar[type[Collator]] = ReplacedTokenCollator
    language: ClassVar[bool] = False
    logs_metrics: ClassVar[bool] = True

    rate: float = 0.15
    mask_share: float = 0.85
    generator_fraction: float = 0.25
    generator: dict[str, Any] | None = None
    share_embeddings: bool = True
    temperature: float = 1.0
    weight: float = 50.0

    def __post_init__(self) -> None:
        MaskedObjective(rate=self.rate, mask_share=self.mask_share, random_share=0.0)
        if not 0 < self.generator_fraction <= 1:
            raise ValueError(f"generator_fraction must lie above 0 and be 1 at most, got {self.generator_fraction}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.weight < 0:
            raise ValueError(f"weight must be 0 or more, got {self.weight}")

    def check(self, config: Any, tokenizer: Any) -> None:
        """As for every objective; an encoder without that head will do as the discriminator of another generator."""
        tagger = has_head(config, "AutoModelForTokenClassification") and direction_of(config) == "both"
        if "model_type" in (self.generator or {}) and tagger:
            self.check_tokenizer(tokenizer)
        else:
            super().check(config, tokenizer)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer without a mask token."""
        require_mask_token(self.name, tokenizer)

    def packing(self, tokenizer: Any, length: int) -> dict[str, Any]:
        """Rows of `length` tokens, cls and sep included as far as the tokenizer has them."""
        return {"length": length, **framed(tokenizer)}

    def build(self, config: Any) -> Any:
        """Generator and discriminator with fresh weights.

        Args:
            config: The discriminator's configuration.

        Raises:
            ValueError: The generator that this objective describes can't be had.
        """
        from ..models.composed.modeling_replaced_token import ReplacedTokenForPreTraining, compose

        if config.model_type == self.composed_type:
            return ReplacedTokenForPreTraining(config)
        return compose(
            self.generator_config(config), config, shared=self.share_embeddings, temperature=self.temperature,
            weight=self.weight,
        )  # fmt: skip

    def continuation_overrides(self, config: Any, given: Collection[str]) -> dict[str, Any]:
        """Temperature and weight may change when a run goes on; generator and sharing are what they are, see the base."""
        if config.model_type != self.composed_type:
            return {}
        if "share_embeddings" in given and self.share_embeddings != config.tie_word_embeddings:
            raise ValueError(
                f"the checkpoint was made with share_embeddings={config.tie_word_embeddings}, got {self.share_embeddings}"
            )
        if {"generator", "generator_fraction"} & set(given):
            wanted = self._as_saved(self.generator_config(config.part("discriminator")))
            found = self._as_saved(config.part("generator"))
            differing = [name for name, value in wanted.items() if found.get(name) != value]
            if differing:
                name = differing[0]
                raise ValueError(
                    f"the checkpoint was made with another generator ({name}={found.get(name)!r}, wanted "
                    f"{wanted[name]!r}): leave generator and generator_fraction out to go on with it"
                )
        return {name: getattr(self, name) for name in ("temperature", "weight") if name in given}

    @staticmethod
    def _as_saved(config: Any) -> dict[str, Any]:
        """A configuration's values as a file would give them back, without what says who wrote them."""
        from ..models.composed.configuration_composed import plain_config

        values = json.loads(json.dumps(plain_config(config), default=str))
        return {name: value for name, value in values.items() if name not in ("transformers_version", "dtype")}

    def generator_config(self, config: Any) -> Any:
        """The generator's configuration: the discriminator's made narrower, or another family's.

        Raises:
            ValueError: Names the field that doesn't fit, or the family without a masked language model's head.
        """
        from transformers import CONFIG_MAPPING

        fields = dict(self.generator or {})
        kind = fields.pop("model_type", config.model_type)
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"generator.model_type must be a family of transformers or hf_lnlm, got {kind!r}")
        if kind == config.model_type:
            values = narrowed(config, self.generator_fraction) | fields
        else:
            values = {name: getattr(config, name, None) for name in COMMON} | fields
            values = {name: value for name, value in values.items() if value is not None}
        try:
            made = CONFIG_MAPPING[kind](**values)
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the generator ({kind}): {reason}; set generator_fraction or generator") from None
        if not (has_head(made, self.auto_class) and direction_of(made) == "both"):
            raise ValueError(f"the generator must read both ways and have {self.auto_class}, got {self._kind(made)}")
        return made

    @staticmethod
    def _kind(config: Any) -> str:
        return f"{config.model_type}, which reads {direction_of(config)}"

    def logits(self, outputs: Any) -> Any:
        """All outputs: both models are measured."""
        return outputs

    def sums(self, logits: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a batch adds to the metrics.

        Args:
            logits: The model's outputs (see `logits`).
            batch: The collator's batch.

        Returns:
            Sums, float64: of both losses, counts of what was predicted and right, and histograms `(BINS,)` of the logits
            of original and replaced tokens.
        """
        from ..models.composed.modeling_replaced_token import tokens_that_count

        outputs = logits
        found, replaced = outputs["logits"].detach().float(), outputs["replaced"].bool()
        seen = tokens_that_count(batch["labels"], batch.get("attention_mask"))
        found, replaced = found[seen], replaced[seen]
        labels = batch["labels"][batch["labels"] != IGNORED]
        nll, binary = outputs["sums"].detach().double()
        bins = ((found.clamp(-SPAN, SPAN) + SPAN) * ((BINS - 1) / (2 * SPAN))).round().long()
        return {
            "generator_nll": nll,
            "generator_tokens": torch.tensor(float(labels.numel()), dtype=torch.float64, device=nll.device),
            "generator_correct": (outputs["generator_logits"].argmax(-1) == labels).sum().double(),
            "discriminator_nll": binary,
            "discriminator_correct": ((found > 0) == replaced).sum().double(),
            "original_histogram": torch.bincount(bins[~replaced], minlength=BINS).double(),
            "replaced_histogram": torch.bincount(bins[replaced], minlength=BINS).double(),
        }

    def summary(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Metrics of added-up sums: losses in nats, accuracies, `replaced_share`, `discriminator_auc`.

        Raises:
            ValueError: No token was masked.
        """
        if float(sums["generator_tokens"]) == 0:
            raise ValueError("no token was masked (0 % of the labels count), so there is nothing to measure")
        original, replaced = sums["original_histogram"].double(), sums["replaced_histogram"].double()
        masked, tokens = float(sums["generator_tokens"]), float(original.sum() + replaced.sum())
        metrics = {
            "generator_loss": float(sums["generator_nll"]) / masked,
            "generator_accuracy": float(sums["generator_correct"]) / masked,
            "discriminator_loss": float(sums["discriminator_nll"]) / tokens,
            "discriminator_accuracy": float(sums["discriminator_correct"]) / tokens,
            "replaced_share": float(replaced.sum()) / tokens,
        }
        auc = area_under_curve(original, replaced)
        return metrics if auc is None else {**metrics, "discriminator_auc": auc}


COMMON = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings")
"""Fields that a generator of another family takes over."""
_WIDTHS = ("hidden_size", "last_hidden_size", "intermediate_size")
_HEADS = ("num_attention_heads", "num_key_value_heads")


def narrowed(config: Any, fraction: float) -> dict[str, Any]:
    """A configuration's values with widths and heads multiplied by a fraction; layers and embeddings stay.

    Args:
        config: The discriminator's.
        fraction: In (0, 1]. The hidden size becomes a whole number of heads as wide as before, or a multiple of 8 where
            there are none, or so few that not one would be left.
    """
    from transformers import CONFIG_MAPPING

    from ..models.composed.configuration_composed import plain_config

    values = plain_config(config)
    if isinstance(parts := getattr(config, "parts", None), dict):
        main = parts[config.main_part]
        inner = CONFIG_MAPPING[main.model_type].from_dict(narrowed(main, fraction))
        return values | {config.main_part: inner, "hidden_size": inner.hidden_size}
    heads = values.get("num_attention_heads")
    step = config.hidden_size // heads if heads and heads * fraction >= 1 else 8
    width = max(1, round(config.hidden_size * fraction / step)) * step
    scale = width / config.hidden_size
    values |= {name: max(1, round(values[name] * scale)) for name in _WIDTHS + _HEADS if values.get(name)}
    values["hidden_size"] = width
    if isinstance(values.get("time_step_rank"), int):
        values["time_step_rank"] = None
    inner = values.get("expand", 1) * width
    if values.get("num_heads") is not None:
        values["num_heads"] = None
    if isinstance(values.get("head_dim"), int) and inner % values["head_dim"]:
        values["head_dim"] = np.gcd(inner, values["head_dim"]).item()
    return values


def area_under_curve(original: Tensor, replaced: Tensor) -> float | None:
    """Probability that a replaced token scores higher than an original one, ties counted as half.

    Args:
        original: Histogram of the scores of original tokens, lowest bin first, `(bins,)`.
        replaced: The same of replaced tokens.

    Returns:
        In [0, 1], or None if there is none of a kind.
    """
    if not (original.sum() and replaced.sum()):
        return None
    below = original.cumsum(0) - original / 2
    return float((replaced * below).sum() / (original.sum() * replaced.sum()))
