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
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.import_utils import is_torchdynamo_compiling

from ...nn.loss_heads import check_labels, next_token_labels, normalised
from ...nn.masks import end_token
from ..heads import QuestionAnsweringHead, SequenceClassificationHead, TokenClassificationHead, handed_on
from .memory_config import MemoryConfig
from .memory_model import AddressingOutput, MemoryModel, MemoryPreTrainedModel

IGNORED = -100.0


@dataclass
class SequenceTransductionOutput(AddressingOutput, CausalLMOutputWithPast):
    """Output of a sequence transducer: mean cross-entropy in nats a labelled bit, logits `(batch, length,
    output_size)`, the state and the addressing."""


@dataclass
class MemoryCausalLMOutput(AddressingOutput, CausalLMOutputWithPast):
    """A language model's output, and the addressing."""


@dataclass
class MemorySequenceClassifierOutput(AddressingOutput, SequenceClassifierOutput):
    """A text classifier's output, and the addressing."""


@dataclass
class MemoryTokenClassifierOutput(AddressingOutput, TokenClassifierOutput):
    """A tagger's output, and the addressing."""


@dataclass
class MemoryQuestionAnsweringOutput(AddressingOutput, QuestionAnsweringModelOutput):
    """A reader's output, and the addressing."""


class MemoryHead(MemoryPreTrainedModel):
    """What every head has: the family's body and a loss that obeys `num_items_in_batch`."""

    body_class: ClassVar[type[MemoryModel]]


class MemoryForCausalLM(MemoryHead, GenerationMixin):
    """Language model.

    Args:
        config: the model's configuration, with `bidirectional=False` and without `input_size`.

    Raises:
        ValueError: the config is bidirectional, or its inputs are not tokens.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MemoryConfig) -> None:
        if config.bidirectional:
            raise ValueError(
                "a causal language model cannot be bidirectional: config.bidirectional must be False, got True"
            )
        if config.input_size is not None:
            raise ValueError(f"a language model reads tokens: input_size must be None, got {config.input_size}")
        super().__init__(config)
        self.model = self.body_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MemoryCausalLMOutput:
        """Run the model and, given labels, its loss; see `MemoryModel.forward` for the other arguments.

        Args:
            labels: `(batch, length)`, the input ids; shifted inside. -100 is ignored.
            logits_to_keep: how many last positions (or which) get logits; 0 for all.
            kwargs: `shift_labels` `(batch, length)`, labels already shifted, and `num_items_in_batch`, by which the
                summed loss is divided, as Trainer gives them.

        Returns:
            loss in nats a token, logits `(batch, kept, vocab_size)`, the state and the addressing if wanted.

        Raises:
            ValueError: labels are no token ids, or of another shape.
        """
        shift_labels: Any = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            seq_idx=seq_idx,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        given = labels if shift_labels is None else shift_labels
        if given is not None:
            check_labels(given, self.config.vocab_size, tuple(outputs.last_hidden_state.shape[:2]))
            targets = next_token_labels(given, shift_labels)
            items = kwargs.get("num_items_in_batch")
            loss = self.loss_function(
                logits, None, self.config.vocab_size, shift_labels=targets, num_items_in_batch=items
            )
        return MemoryCausalLMOutput(loss=loss, logits=logits, **handed_on(outputs, MemoryCausalLMOutput))


class MemoryForSequenceClassification(SequenceClassificationHead, MemoryHead):
    """Text classifier or regressor: reads the last real token's output (and adds the first one's, if bidirectional).

    Args:
        config: the model's configuration.
    """

    output_class: ClassVar[Any] = MemorySequenceClassifierOutput

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = self.body_class(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

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

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = self.body_class(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class MemoryForQuestionAnswering(QuestionAnsweringHead, MemoryHead):
    """Extractive question answering: first and last token of the answer.

    Args:
        config: the model's configuration.
    """

    output_class: ClassVar[Any] = MemoryQuestionAnsweringOutput

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.model = self.body_class(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


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
        **kwargs: Unpack[TransformersKwargs],
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
        given = handed_on(outputs, SequenceTransductionOutput)
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
