"""What the convolutional text classifiers share: reading the inputs, and the classification head.

Every one of them is an encoder of the text to one vector (`pooler_output`), followed by dropout and a linear layer whose
rows may be constrained in length.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from ...nn.convolution import Justified, check_mask, left_justify
from ...nn.loss_heads import classification_loss
from ...nn.max_norm import MaxNormLinear, apply_constraints
from ..base import LNLMPreTrainedModel

QUIET_STD = 1e-3
"""Standard deviation of a classifier that begins near zero; not zero, so that every layer has a gradient from the start."""


def embed_inputs(
    embedding: nn.Module, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> torch.Tensor:
    """Return the embeddings `(batch, length, width)` of whichever input is given.

    Args:
        embedding: maps `(batch, length)` ids to `(batch, length, width)`.
        input_ids: `(batch, length)`.
        inputs_embeds: `(batch, length, width)`.

    Raises:
        ValueError: both or none of the inputs are given, the sequence is empty, or (on a CPU) an id has no embedding.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given, got both or none")
    hidden = _looked_up(embedding, input_ids) if inputs_embeds is None else inputs_embeds
    if hidden.dim() != 3 or hidden.shape[1] == 0:
        raise ValueError(f"the input must be (batch, length) with length >= 1, got shape {tuple(hidden.shape[:-1])}")
    return hidden


def _looked_up(embedding: nn.Module, input_ids: torch.Tensor | None) -> torch.Tensor:
    try:
        return embedding(input_ids)
    except IndexError as error:  # torch names neither the argument nor its value
        low, high = (int(value) for value in torch.aminmax(input_ids)) if input_ids is not None else (0, 0)
        raise ValueError(f"input_ids must be between 0 and vocab_size - 1, got values from {low} to {high}") from error


def plan_rows(attention_mask: torch.Tensor | None, hidden: torch.Tensor) -> Justified | None:
    """Return how to left-justify a batch `(batch, length, width)`, or None if no position is masked.

    Raises:
        ValueError: the mask's shape is not the input's.
    """
    mask = check_mask(attention_mask, hidden.shape[0], hidden.shape[1])
    if mask is None or (not torch.compiler.is_compiling() and bool(mask.all())):
        return None
    return left_justify(mask)


class TextClassifier(LNLMPreTrainedModel):
    """Base of the `…ForSequenceClassification` classes: encoder, dropout, classifier.

    A subclass's `__init__` builds `self.model` and calls `build_head`.

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
        """Add dropout and classifier and initialise the model.

        Args:
            features: width of the encoder's `pooler_output`.
            dropout: dropout of these features.
            max_norm: greatest length of a row of the classifier's weight, or None.
        """
        self.num_labels = self.config.num_labels
        self.dropout = nn.Dropout(dropout)
        self.classifier = MaxNormLinear(features, self.num_labels, max_norm)
        self.post_init()

    def apply_constraints(self) -> None:
        """Project the constrained weights; for a trainer to call after each optimiser step.

        Without such a trainer the model does it at its next training forward, so nothing is lost.
        """
        apply_constraints(self)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Score texts.

        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, length)`, nonzero at real tokens; the others are as if they were not there.
            inputs_embeds: `(batch, length, hidden_size)` instead of `input_ids`.
            labels: `(batch,)` ids or values, or `(batch, num_labels)`; see `config.problem_type`.
            kwargs: `num_items_in_batch`, `output_hidden_states` and the like.

        Returns:
            loss (with labels), logits `(batch, num_labels)` and the encoder's hidden states if asked for.

        Raises:
            ValueError: inputs, mask or labels do not fit together.
        """
        if self.reads_pooled_only and not (kwargs.get("output_hidden_states") or self.config.output_hidden_states):
            kwargs["pooled_only"] = True
        outputs: BaseModelOutputWithPooling = self.model(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = self._loss(logits, labels, kwargs) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, kwargs: Any) -> torch.Tensor:
        return classification_loss(logits, labels, self.config, kwargs.get("num_items_in_batch"))
