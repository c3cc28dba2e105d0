"""What the convolutional text classifiers share: reading the inputs, and the classification head.

Every one of them is an encoder of the text to one vector (`pooler_output`), followed by dropout and a linear layer whose
rows may be constrained in length.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init

from ...nn.convolution import Justified, left_justify
from ...nn.inputs import prepare
from ...nn.max_norm import MaxNormLinear, apply_constraints
from ..base import LNLMPreTrainedModel
from ..heads import SequenceClassificationHead

QUIET_STD = 1e-3
"""Standard deviation of a classifier that begins near zero; not zero, so that every layer has a gradient from the start."""


def read_text(
    model: Any,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    keywords: dict[str, Any],
) -> tuple[torch.Tensor, Justified | None]:
    """Return embeddings `(batch, length, width)` and how to left-justify them, None if no position is masked.

    Args:
        model: whose `embed` takes ids to embeddings.
        input_ids: `(batch, length)`; or give `inputs_embeds` `(batch, length, width)`.
        attention_mask: `(batch, length)`, 1 at real tokens.
        inputs_embeds: see `input_ids`.
        keywords: the other arguments of `forward`.

    Raises:
        ValueError: inputs and mask do not fit together.
        TypeError: an argument would be ignored.
    """
    for name in ("cu_seq_lens_q", "position_ids", "seq_idx"):
        if keywords.get(name) is not None:
            raise ValueError(f"a text classifier reads one text a row, from its first token: {name} must be None")
    batch = prepare(model, input_ids, inputs_embeds, (attention_mask, None, None), None, False, keywords)
    mask = batch.segments.mask
    return batch.hidden, None if mask is None else left_justify(mask)


class TextClassifier(SequenceClassificationHead, LNLMPreTrainedModel):
    """Base of the `…ForSequenceClassification` classes: encoder, dropout, classifier; `make_head` calls `build_head`.

    Attributes:
        reads_pooled_only: whether the encoder can leave out what is not pooled (`pooled_only`).
        quiet_start: whether the classifier begins near zero. Below dense layers of ReLU the scores of a fresh classifier
            are noise of the size of the loss, and the first thing learnt is to switch its inputs off.
    """

    reads_pooled_only: ClassVar[bool] = False
    quiet_start: ClassVar[bool] = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if self.quiet_start and isinstance(module, MaxNormLinear):
            init.normal_(module.weight, std=QUIET_STD)

    def build_head(self, features: int, dropout: float, max_norm: float | None) -> None:
        """Add dropout and classifier.

        Args:
            features: width of the encoder's `pooler_output`.
            dropout: dropout of these features.
            max_norm: greatest length of a row of the classifier's weight, or None.
        """
        self.dropout = nn.Dropout(dropout)
        self.classifier = MaxNormLinear(features, self.num_labels, max_norm)

    def apply_constraints(self) -> None:
        """Project the constrained weights; for a trainer to call after each optimiser step.

        Without such a trainer the model does it at its next training forward, so nothing is lost.
        """
        apply_constraints(self)

    def body_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Leave out what is not pooled where nobody wants it; see `SequenceClassificationHead`."""
        wanted = given.get("output_hidden_states") or self.config.output_hidden_states
        return given | ({"pooled_only": True} if self.reads_pooled_only and not wanted else {})

    def pooled(self, outputs: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Take the encoder's `pooler_output`; see `SequenceClassificationHead`."""
        return outputs.pooler_output
