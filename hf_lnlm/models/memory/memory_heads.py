"""Heads of the memory-augmented models: language model, classifiers, question answering, sequence transduction.

Complexity: one linear map a position beside the body.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple, logging
from transformers.utils.import_utils import is_torchdynamo_compiling

from ...nn.loss_heads import IGNORED, normalised
from ...nn.masks import end_token
from ..heads import (
    CausalLMHead,
    MaskedLMHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
    passthrough_outputs,
)
from .memory_config import MemoryConfig
from .memory_model import AddressingOutput, MemoryModel, MemoryPreTrainedModel

logger = logging.get_logger(__name__)


@dataclass
class SequenceTransductionOutput(AddressingOutput, CausalLMOutputWithPast):
    """Output of a sequence transducer: mean cross-entropy in nats a labelled bit, logits `(batch, length,
    output_size)`, the state and the addressing."""


@dataclass
class MemoryCausalLMOutput(AddressingOutput, CausalLMOutputWithPast):
    """A language model's output, and the addressing."""


@dataclass
class MemoryMaskedLMOutput(AddressingOutput, MaskedLMOutput):
    """A masked language model's output, and the addressing."""


@dataclass
class MemorySequenceClassifierOutput(AddressingOutput, SequenceClassifierOutput):
    """A text classifier's output, and the addressing."""


@dataclass
class MemoryTokenClassifierOutput(AddressingOutput, TokenClassifierOutput):
    """A tagger's output, and the addressing."""


@dataclass
class MemoryQuestionAnsweringOutput(AddressingOutput, QuestionAnsweringModelOutput):
    """A reader's output, and the addressing."""


def refuse_vectors(config: MemoryConfig) -> None:
    """Refuse a language model over vectors.

    Raises:
        ValueError: the config has an `input_size`.
    """
    if config.input_size is not None:
        raise ValueError(f"a language model reads tokens: input_size must be None, got {config.input_size}")


class MemoryHead(MemoryPreTrainedModel):
    """What every head has: the family's body and a loss that obeys `num_items_in_batch`."""

    body_class: ClassVar[type[MemoryModel]]


class MemoryForCausalLM(CausalLMHead, MemoryHead, GenerationMixin):
    """Language model.

    Args:
        config: the model's configuration, with `bidirectional=False` and without `input_size`.

    Raises:
        ValueError: the config is bidirectional, or its inputs are not tokens.
    """

    output_class: ClassVar[Any] = MemoryCausalLMOutput

    def __init__(self, config: MemoryConfig) -> None:
        if config.bidirectional:
            raise ValueError(
                "a causal language model cannot be bidirectional: config.bidirectional must be False, got True"
            )
        refuse_vectors(config)
        super().__init__(config)


class MemoryForMaskedLM(MaskedLMHead, MemoryHead):
    """Masked language model that reads both ways.

    Args:
        config: the model's configuration, without `input_size`. `bidirectional=None` becomes true; false, as in a
            checkpoint that was made to read one way, is taken with a warning: a mask's right-hand side is not seen.

    Raises:
        ValueError: the model's inputs are not tokens.
    """

    output_class: ClassVar[Any] = MemoryMaskedLMOutput
    untied_bias = True

    def __init__(self, config: MemoryConfig) -> None:
        refuse_vectors(config)
        config.bidirectional = config.bidirectional is not False
        if not config.bidirectional:
            logger.warning(f"{type(self).__name__} with bidirectional=False does not see what follows a mask")
        super().__init__(config)


class MemoryForSequenceClassification(SequenceClassificationHead, MemoryHead):
    """Text classifier or regressor: reads the last real token's output (and adds the first one's, if bidirectional).

    Args:
        config: the model's configuration.
    """

    output_class: ClassVar[Any] = MemorySequenceClassifierOutput

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Take the last real token, plus the first if both directions are read; see `SequenceClassificationHead`."""
        last = end_token(hidden, mask)
        return last + end_token(hidden, mask, first=True) if self.config.bidirectional else last


class MemoryForTokenClassification(TokenClassificationHead, MemoryHead):
    """Tagger.

    Args:
        config: the model's configuration.
    """

    output_class: ClassVar[Any] = MemoryTokenClassifierOutput


class MemoryForQuestionAnswering(QuestionAnsweringHead, MemoryHead):
    """Extractive question answering: first and last token of the answer.

    Args:
        config: the model's configuration.
    """

    output_class: ClassVar[Any] = MemoryQuestionAnsweringOutput


class MemoryForSequenceTransduction(MemoryHead):
    """From continuous vectors to bits, step by step: the papers' algorithmic tasks.

    Args:
        config: the model's configuration, with `input_size` (and `output_size`).

    Raises:
        ValueError: the config has no `input_size`.
    """

    accepts_loss_kwargs = True

    def __init__(self, config: MemoryConfig) -> None:
        if config.input_size is None:
            raise ValueError("sequence transduction reads continuous vectors: input_size must be a width, got None")
        super().__init__(config)
        self.model = self.body_class(config, continuous=True)
        width = int(config.output_size or config.hidden_size)
        self.output = nn.Linear(config.hidden_size, width) if config.residual else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        inputs_embeds: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_addressing: bool | None = None,
        **kwargs: Any,
    ) -> SequenceTransductionOutput:
        """Run the model and, given labels, its loss.

        Args:
            inputs_embeds: `(batch, length, input_size)`.
            attention_mask, past_key_values, use_cache, output_addressing: as in `MemoryModel.forward`.
            labels: `(batch, length, output_size)` bits, zero or one; -100 is ignored.

        Returns:
            loss in nats a labelled bit, logits `(batch, length, output_size)`, the state and the addressing if wanted.

        Raises:
            ValueError: labels are no bits, or of another shape.
        """
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_addressing=output_addressing,
            **kwargs,
        )
        logits = self.output(outputs.last_hidden_state)
        loss = None if labels is None else bit_loss(logits, labels, kwargs.get("num_items_in_batch"))
        given = passthrough_outputs(outputs, SequenceTransductionOutput)
        return SequenceTransductionOutput(loss=loss, logits=logits, **given)


def bit_loss(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Return the cross-entropy in nats a labelled bit.

    Args:
        logits: `(batch, length, bits)`.
        labels: of the same shape, zero, one or -100 (ignored).
        num_items_in_batch: labelled bits of the whole accumulated batch, or None.

    Raises:
        ValueError: the shapes differ, or (looked at on the CPU only) a label is no bit.
    """
    if labels.shape != logits.shape:
        raise ValueError(f"labels must have the shape of the logits, {tuple(logits.shape)}, got {tuple(labels.shape)}")
    counted = labels != IGNORED
    targets = torch.where(counted, labels, 0).float()
    if labels.device.type == "cpu" and not is_torchdynamo_compiling():
        low, high = targets.aminmax() if targets.numel() else (targets.new_zeros(()), targets.new_zeros(()))
        if not (low >= 0 and high <= 1):  # NaN is neither
            wrong = targets[~((targets >= 0) & (targets <= 1))]
            raise ValueError(f"labels must be between 0 and 1, or -100 to be ignored, got {float(wrong[0])}")
    total = binary_cross_entropy_with_logits(logits.float(), targets, counted.float(), reduction="sum")
    return normalised(total, counted.sum(), num_items_in_batch)
