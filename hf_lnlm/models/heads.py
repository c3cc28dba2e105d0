"""Heads that several families share: language models' softmax, text and token classifiers, question answering.

Each is what lies between a base model's hidden states and a loss; a family's own class adds its `__init__` (which names the
base model, so that carried code builds it directly) and what is its own. They are mixins: list them before the family's
`...PreTrainedModel`.

References:
    [1] Grave et al. 2017, "Efficient softmax approximation for GPUs" (adaptive softmax).
"""

import math
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..nn.loss_heads import (
    IGNORED,
    AdaptiveSoftmax,
    check_labels,
    chunked_loss,
    classification_loss,
    next_token_labels,
    normalised,
)


def check_adaptive(config: Any, width: int) -> None:
    """Check the fields of an adaptive softmax [1] against each other.

    Args:
        config: with `vocab_size`, `tie_word_embeddings`, `adaptive_cutoffs` and `adaptive_div_value`.
        width: of the hidden states that reach the head.

    Raises:
        ValueError: cutoffs that are no clusters, tied embeddings, or a last cluster without width.
    """
    cutoffs = list(config.adaptive_cutoffs or [])
    fits = cutoffs and cutoffs == sorted(set(cutoffs)) and cutoffs[0] > 0 and cutoffs[-1] < config.vocab_size
    if not fits:
        raise ValueError(
            f"adaptive_cutoffs must ascend strictly between 0 and vocab_size ({config.vocab_size}), "
            f"got {config.adaptive_cutoffs}"
        )
    if config.tie_word_embeddings:
        raise ValueError("loss_head='adaptive' has its own projections: tie_word_embeddings must be false, got true")
    narrowing = config.adaptive_div_value
    hopeless = math.log2(narrowing) * len(cutoffs) > 64  # asked first: the power might not fit a float
    if hopeless or int(width // narrowing ** len(cutoffs)) < 1:
        raise ValueError(
            f"adaptive_div_value leaves the last of {len(cutoffs)} clusters no width: it must be smaller or the hidden "
            f"size larger, got {narrowing}"
        )


class VocabularyHead:
    """Full, chunked or adaptive softmax over the vocabulary, as `config.loss_head` says.

    A language model calls `make_vocabulary_head` in `__init__`, after its base model, and `loss_and_logits` in `forward`.
    """

    config: Any
    lm_head: Any
    loss_function: Any
    output_projection: nn.Module | None
    training: bool

    def make_vocabulary_head(self) -> None:
        """Make `lm_head`, and `output_projection` where tied embeddings have another width than the hidden states."""
        config = self.config
        width, embedding = config.output_size, int(config.embedding_size or config.hidden_size)
        narrowed = config.tie_word_embeddings and width != embedding
        self.output_projection = nn.Linear(width, embedding, bias=False) if narrowed else None
        width = embedding if narrowed else width
        if config.loss_head == "adaptive":
            cutoffs = list(config.adaptive_cutoffs or [])
            self.lm_head = AdaptiveSoftmax(width, config.vocab_size, cutoffs, config.adaptive_div_value)
        else:
            self.lm_head = nn.Linear(width, config.vocab_size, bias=not config.tie_word_embeddings)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the LM head; None for an adaptive softmax, which cannot be resized."""
        return None if self.config.loss_head == "adaptive" else self.lm_head

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize embeddings and head, as in transformers.

        Raises:
            ValueError: the head is an adaptive softmax, whose clusters belong to one vocabulary.
        """
        size = self.config.vocab_size
        if self.config.loss_head == "adaptive" and new_num_tokens not in (None, size):
            raise ValueError(f"an adaptive softmax cannot be resized from {size} to {new_num_tokens} tokens")
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)  # type: ignore[misc]

    def loss_and_logits(
        self, hidden: torch.Tensor, targets: torch.Tensor | None, logits_to_keep: int | torch.Tensor, items: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return loss and logits; while training with a chunked or adaptive head the logits are never computed.

        Args:
            hidden: `(batch, length, output_size)`.
            targets: `(batch, length)` the token that each position is to predict, -100 where ignored; None for no loss.
            logits_to_keep: how many last positions (or which) get logits; 0 for all.
            items: number of labels of the whole accumulated batch, or None.
        """
        if self.output_projection is not None:
            hidden = self.output_projection(hidden)
        if targets is not None and self.training and self.config.loss_head != "full" and not is_torchdynamo_compiling():
            return self._loss_without_logits(hidden, targets, items), None
        logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        return None if targets is None else self.vocabulary_loss(logits, targets, items), logits

    def vocabulary_loss(self, logits: torch.Tensor, targets: torch.Tensor, items: Any) -> torch.Tensor:
        """Return the mean loss in nats a labelled token, by the loss that transformers gives a causal model."""
        size = self.config.vocab_size
        return self.loss_function(logits, None, size, shift_labels=targets, num_items_in_batch=items)

    def _loss_without_logits(self, hidden: torch.Tensor, targets: torch.Tensor, items: Any) -> torch.Tensor:
        flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).to(hidden.device)
        if self.config.loss_head == "adaptive":
            total = self.lm_head.summed_loss(flat, labels)
        else:
            dtype = getattr(torch, self.config.loss_dtype)
            total = chunked_loss(self.lm_head, flat, labels, self.config.loss_chunk_size, dtype)
        return normalised(total, (labels != IGNORED).sum(), items)


def targets_of(labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> torch.Tensor | None:
    """Return the next token's label of each position, `(batch, length)`, or None when no labels were given."""
    given = labels if shift_labels is None else shift_labels
    return None if given is None else next_token_labels(given, shift_labels)


def handed_on(outputs: Any, output_class: type) -> dict[str, Any]:
    """Return what a head gives of its base model's outputs: all that the head's own outputs have a field for.

    Args:
        outputs: of the base model.
        output_class: a dataclass, every field of which has a default (dynamo can't trace `dataclasses.fields`).
    """
    return {name: value for name, value in outputs.items() if hasattr(output_class, name)}


class SequenceClassificationHead:
    """`forward` of a text classifier or regressor with `model`, `dropout` and `classifier`; the family adds `pool`."""

    output_class: ClassVar[Any] = SequenceClassifierOutput

    model: Any
    dropout: Any
    classifier: Any
    config: Any

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Sum up a text.

        Args:
            hidden: `(batch, length, width)`.
            mask: `(batch, length)` booleans; None if every token is real.

        Returns:
            `(batch, width of the classifier)`; zeros for a row without any real token.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how it sums up a text")

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Classify texts.

        Args:
            input_ids, attention_mask, inputs_embeds: as in the base model's `forward`.
            labels: `(batch,)` class ids, or values as `config.problem_type` wants them.

        Returns:
            loss and logits `(batch, num_labels)`. A row without any real token is classified from zeros.
        """
        kwargs["use_cache"] = False
        outputs = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        mask = None if attention_mask is None else attention_mask.bool()
        logits = self.classifier(self.dropout(self.pool(outputs.last_hidden_state, mask)))
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config, kwargs.get("num_items_in_batch"))
        return self.output_class(loss=loss, logits=logits, **handed_on(outputs, self.output_class))


class TokenClassificationHead:
    """`forward` of a tagger with `model`, `dropout` and `classifier`."""

    output_class: ClassVar[Any] = TokenClassifierOutput

    model: Any
    dropout: Any
    classifier: Any
    config: Any
    loss_function: Any

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Tag tokens.

        Args:
            input_ids, attention_mask, inputs_embeds: as in the base model's `forward`.
            labels: `(batch, length)` class ids; -100 is ignored.

        Returns:
            loss and logits `(batch, length, num_labels)`.
        """
        kwargs["use_cache"] = False
        outputs = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            check_labels(labels, logits.shape[-1], logits.shape[:-1])
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=kwargs.get("num_items_in_batch"))
        return self.output_class(loss=loss, logits=logits, **handed_on(outputs, self.output_class))


class QuestionAnsweringHead:
    """`forward` of an extractive reader with `model`, `qa_outputs` (two outputs) and, if it has one, `dropout`."""

    output_class: ClassVar[Any] = QuestionAnsweringModelOutput

    model: Any
    qa_outputs: Any
    loss_function: Any

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """Mark an answer's first and last token.

        Args:
            input_ids, attention_mask, inputs_embeds: as in the base model's `forward`.
            start_positions, end_positions: `(batch,)` positions of the answer's ends; beyond the text: ignored.

        Returns:
            loss, and start and end logits `(batch, length)`.
        """
        kwargs["use_cache"] = False
        outputs = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        hidden = outputs.last_hidden_state
        dropout = getattr(self, "dropout", None)
        start, end = self.qa_outputs(hidden if dropout is None else dropout(hidden)).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            items = kwargs.get("num_items_in_batch")
            loss = self.loss_function(start, end, start_positions, end_positions, num_items_in_batch=items)
        ends = {"start_logits": start, "end_logits": end}
        return self.output_class(loss=loss, **ends, **handed_on(outputs, self.output_class))
