"""Heads that several families share: language models' softmax, text and token classifiers, question answering.

Each is what lies between a base model's hidden states and a loss; a family's own class names the base model and adds what
is its own. They are mixins: list them before the family's `...PreTrainedModel`.

References:
    [1] Grave et al. 2017, "Efficient softmax approximation for GPUs" (adaptive softmax).
"""

from functools import wraps
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..nn.inputs import opened
from ..nn.loss_heads import (
    IGNORED,
    AdaptiveSoftmax,
    check_labels,
    check_positions,
    chunked_loss,
    classification_loss,
    next_token_labels,
    normalised,
    product_dtype,
)

MOST_LOGITS = 2**26
"""Logits of a training batch that `loss_head="auto"` computes at once: a quarter of a gigabyte in float32."""


class Head:
    """A base model and the layers over it; the family says which base model, a kind of head what layers.

    Args:
        config: the model's configuration.
    """

    body_class: ClassVar[Any]
    config: Any
    loss_function: Any
    training: bool
    post_init: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # of the family's base class
        self.num_labels = config.num_labels
        self.model = self.body_class(config)
        self.make_head(config)
        self.post_init()

    def make_head(self, config: Any) -> None:
        """Make the layers between the base model's hidden states and what the head gives out."""
        raise NotImplementedError(f"{type(self).__name__} must make its layers")

    def penalty(self, outputs: Any, targets: Any, items: Any) -> torch.Tensor | float:
        """Return what is added to the loss besides the labels' own; 0 unless a family says otherwise.

        Args:
            outputs: of the base model.
            targets: the labels, as the loss reads them: of a causal model the token that each position is to predict.
            items: number of labels of the whole accumulated batch, or None.
        """
        return 0.0


class VocabularyHead(Head):
    """Full, chunked or adaptive softmax over the vocabulary, as `config.loss_head` says; "auto" is full or chunked.

    Attributes:
        untied_bias: whether a full or chunked softmax that is not tied to the embeddings has a bias.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    untied_bias: ClassVar[bool] = False

    lm_head: Any
    output_projection: nn.Module | None

    def make_head(self, config: Any) -> None:
        """Make the softmax; see `make_vocabulary_head`."""
        self.make_vocabulary_head(bias=self.untied_bias and not config.tie_word_embeddings)

    def make_vocabulary_head(self, bias: bool = False) -> None:
        """Make `lm_head`, and `output_projection` where tied embeddings have another width or `config.project_output`.

        Args:
            bias: whether a full or chunked softmax has one.
        """
        config = self.config
        width, embedding = config.head_width, int(getattr(config, "embedding_size", None) or config.hidden_size)
        projects = bool(getattr(config, "project_output", False))
        narrowed = config.tie_word_embeddings and (width != embedding or projects)
        self.output_projection = nn.Linear(width, embedding, bias=False) if narrowed else None
        width = embedding if narrowed else width
        if config.loss_head == "adaptive":
            cutoffs = list(config.adaptive_cutoffs or [])
            self.lm_head = AdaptiveSoftmax(width, config.vocab_size, cutoffs, config.adaptive_div_value)
        else:
            self.lm_head = nn.Linear(width, config.vocab_size, bias=bias)

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

        With "auto" that is where they would be more than `MOST_LOGITS`.

        Args:
            hidden: `(batch, length, output_size)`.
            targets: `(batch, length)` the token that each position is to predict, -100 where ignored; None for no loss.
            logits_to_keep: how many last positions (or which) get logits; 0 for all.
            items: number of labels of the whole accumulated batch, or None.
        """
        if self.output_projection is not None:
            hidden = self.output_projection(hidden)
        if targets is not None and self._leaves_logits_out(targets):
            return self._loss_without_logits(hidden, targets, items), None
        logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        return None if targets is None else self.vocabulary_loss(logits, targets, items), logits

    def _leaves_logits_out(self, targets: torch.Tensor) -> bool:
        """Tell whether a training step's loss is taken without ever having all logits."""
        if not self.training or is_torchdynamo_compiling():
            return False
        head = self.config.loss_head
        return targets.numel() * self.config.vocab_size > MOST_LOGITS if head == "auto" else head != "full"

    def vocabulary_loss(self, logits: torch.Tensor, targets: torch.Tensor, items: Any) -> torch.Tensor:
        """Return the mean loss in nats a labelled token, by the loss that transformers gives a causal model."""
        size = self.config.vocab_size
        return self.loss_function(logits, None, size, shift_labels=targets, num_items_in_batch=items)

    def _loss_without_logits(self, hidden: torch.Tensor, targets: torch.Tensor, items: Any) -> torch.Tensor:
        flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).to(hidden.device)
        if self.config.loss_head == "adaptive":
            total = self.lm_head.summed_loss(flat, labels)
        else:
            dtype = product_dtype(flat) if self.config.loss_head == "auto" else getattr(torch, self.config.loss_dtype)
            total = chunked_loss(self.lm_head, flat, labels, self.config.loss_chunk_size, dtype)
        return normalised(total, (labels != IGNORED).sum(), items)


def passthrough_outputs(outputs: Any, output_class: type) -> dict[str, Any]:
    """Return what a head gives of its base model's outputs: all that the head's own outputs have a field for.

    Args:
        outputs: of the base model.
        output_class: a dataclass, every field of which has a default (dynamo can't trace `dataclasses.fields`).
    """
    return {name: value for name, value in outputs.items() if hasattr(output_class, name)}


def with_older_cache_name(prepare: Any) -> Any:
    """Return a method that prepares a step of `generate` with the cache as `past_key_values`, where peft looks for it."""

    @wraps(prepare)  # `generate` takes what the signature names
    def prepared(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(self, *args, **kwargs)
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    return prepared


class CausalLMHead(VocabularyHead):
    """A causal language model."""

    output_class: ClassVar[Any] = CausalLMOutputWithPast
    prepare_inputs_for_generation: Any = with_older_cache_name(GenerationMixin.prepare_inputs_for_generation)

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
        **kwargs: Any,
    ) -> Any:
        """Run the model and, given labels, its loss; see the base model's `forward` for the other arguments.

        Args:
            labels: `(batch, length)`, the input ids; shifted inside. -100 is ignored.
            logits_to_keep: how many last positions (or which) get logits; 0 for all.
            kwargs: `shift_labels` `(batch, length)`, labels already shifted, used in place of `labels`, and
                `num_items_in_batch`, by which the summed loss is divided, as Trainer gives them.

        Returns:
            loss in nats a token, logits `(batch, kept, vocab_size)`, and what the base model returns besides its last
            hidden state. While training with a chunked or adaptive head the logits are None: they are never computed
            (with `loss_head="auto"`, where they would be more than 2**26).

        Raises:
            ValueError: labels are no token ids, or of another shape.
        """
        shift_labels: Any = kwargs.pop("shift_labels", None)  # as an argument, Trainer would take it for a column
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            seq_idx=seq_idx,
            **kwargs,
        )
        hidden, items = outputs.last_hidden_state, kwargs.get("num_items_in_batch")
        targets = self._targets(hidden, labels, shift_labels)
        loss, logits = self.loss_and_logits(hidden, targets, logits_to_keep, items)
        if loss is not None:
            loss = loss + self.penalty(outputs, targets, items)
        return self.output_class(loss=loss, logits=logits, **passthrough_outputs(outputs, self.output_class))

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Continue texts as transformers does; an empty one in a batch begins as it does alone, with the opening token.

        Args:
            inputs: `(batch, length)` token ids, or give `input_ids`.
            args, kwargs: as in transformers' `generate`.
        """
        ids, mask = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
        fresh = kwargs.get("past_key_values") is None and kwargs.get("cache") is None
        opening = self._opening_token(kwargs)
        if fresh and opening is not None and isinstance(mask, torch.Tensor) and mask.dim() == 2 and ids is not None:
            kwargs |= dict(zip(("input_ids", "attention_mask"), opened(ids, mask, opening)))
            inputs = None
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _opening_token(self, given: dict[str, Any]) -> int | None:
        """The token that `generate` begins with where it is given no text."""
        asked, own = given.get("generation_config"), getattr(self, "generation_config", None)
        found = [given.get("bos_token_id"), getattr(asked, "bos_token_id", None), getattr(own, "bos_token_id", None)]
        return next((token for token in found if token is not None), None)

    def _targets(self, hidden: torch.Tensor, labels: Any, shift_labels: Any) -> torch.Tensor | None:
        given = labels if shift_labels is None else shift_labels
        if given is None:
            return None
        name = "labels" if shift_labels is None else "shift_labels"
        check_labels(given, self.config.vocab_size, tuple(hidden.shape[:2]), name)
        return next_token_labels(given, shift_labels)


class MaskedLMHead(VocabularyHead):
    """A masked language model."""

    output_class: ClassVar[Any] = MaskedLMOutput

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Fill masks; see the base model's `forward` for the other arguments.

        Args:
            labels: `(batch, length)`, the ids to be found; -100 is ignored.

        Returns:
            loss in nats a labelled token and logits `(batch, length, vocab_size)`, None while training with a chunked
            or adaptive head.

        Raises:
            ValueError: labels are no token ids, or of another shape.
        """
        kwargs["use_cache"] = False
        outputs = self.model(
            input_ids, attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, seq_idx=seq_idx, **kwargs
        )
        hidden = self.before_softmax(outputs.last_hidden_state)
        if labels is not None:
            check_labels(labels, self.config.vocab_size, tuple(hidden.shape[:2]))
        items = kwargs.get("num_items_in_batch")
        loss, logits = self.loss_and_logits(hidden, labels, 0, items)
        if loss is not None:
            loss = loss + self.penalty(outputs, labels, items)
        return self.output_class(loss=loss, logits=logits, **passthrough_outputs(outputs, self.output_class))

    def before_softmax(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the softmax reads of `hidden`, `(batch, length, width)`: all of it, unless a family transforms it."""
        return hidden

    def vocabulary_loss(self, logits: torch.Tensor, targets: torch.Tensor, items: Any) -> torch.Tensor:
        """Return the mean loss in nats a labelled token, by the loss that transformers gives a masked model."""
        return self.loss_function(logits, targets, self.config.vocab_size, num_items_in_batch=items)


class ClassificationHead(Head):
    """Dropout and a linear map to the classes."""

    classifier: Any

    def make_head(self, config: Any) -> None:
        """Make `dropout` and `classifier`."""
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.head_width, config.num_labels)

    def body_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return what the base model is given beside the inputs, from what `forward` is."""
        return {**given, "use_cache": False}


class SequenceClassificationHead(ClassificationHead):
    """A text classifier or regressor; the family adds `pool`."""

    output_class: ClassVar[Any] = SequenceClassifierOutput

    def pooled(self, outputs: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Return what the classifier reads of the base model's outputs: what `pool` makes of the last hidden state.

        Args:
            outputs: of the base model.
            attention_mask: `(batch, length)`, as it was given.
        """
        hidden = outputs.last_hidden_state
        return self.pool(hidden, None if attention_mask is None else attention_mask[:, -hidden.shape[1] :].bool())

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
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify texts.

        Args:
            input_ids, attention_mask, inputs_embeds: as in the base model's `forward`.
            labels: `(batch,)` class ids, or values as `config.problem_type` wants them.

        Returns:
            loss and logits `(batch, num_labels)`. A row without any real token is classified from zeros.
        """
        outputs = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds, **self.body_arguments(kwargs))
        logits = self.classifier(self.dropout(self.pooled(outputs, attention_mask)))
        loss = None
        if labels is not None:
            items = kwargs.get("num_items_in_batch")
            loss = classification_loss(logits, labels, self.config, items) + self.penalty(outputs, labels, items)
        return self.output_class(loss=loss, logits=logits, **passthrough_outputs(outputs, self.output_class))


class TokenClassificationHead(ClassificationHead):
    """A tagger."""

    output_class: ClassVar[Any] = TokenClassifierOutput

    def features(self, outputs: Any) -> torch.Tensor:
        """Return what the classifier reads of the base model's outputs, `(batch, length, width)`."""
        return outputs.last_hidden_state

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Tag tokens.

        Args:
            input_ids, attention_mask, inputs_embeds: as in the base model's `forward`.
            labels: `(batch, length)` class ids; -100 is ignored.

        Returns:
            loss and logits `(batch, length, num_labels)`.
        """
        outputs = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds, **self.body_arguments(kwargs))
        logits = self.classifier(self.dropout(self.features(outputs)))
        loss = None
        if labels is not None:
            check_labels(labels, logits.shape[-1], logits.shape[:-1])
            items = kwargs.get("num_items_in_batch")
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=items)
            loss = loss + self.penalty(outputs, labels, items)
        return self.output_class(loss=loss, logits=logits, **passthrough_outputs(outputs, self.output_class))


class QuestionAnsweringHead(Head):
    """An extractive reader.

    Attributes:
        drops: whether there is dropout before the last layer.
    """

    output_class: ClassVar[Any] = QuestionAnsweringModelOutput
    drops: ClassVar[bool] = True

    def make_head(self, config: Any) -> None:
        """Make `dropout`, if there is any, and `qa_outputs`: a score of each token as the first, and one as the last."""
        self.dropout = nn.Dropout(config.classifier_dropout) if self.drops else nn.Identity()
        self.qa_outputs = nn.Linear(config.head_width, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Mark an answer's first and last token.

        Args:
            input_ids, attention_mask, inputs_embeds: as in the base model's `forward`.
            start_positions, end_positions: `(batch,)` positions of the answer's ends; -100 and those beyond the text are
                ignored.

        Returns:
            loss, and start and end logits `(batch, length)`.
        """
        kwargs["use_cache"] = False
        outputs = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        start, end = self.qa_outputs(self.dropout(outputs.last_hidden_state)).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            first = check_positions(start_positions, start.shape, "start_positions")
            last = check_positions(end_positions, end.shape, "end_positions")
            loss = self.loss_function(start, end, first, last, num_items_in_batch=kwargs.get("num_items_in_batch"))
        ends = {"start_logits": start, "end_logits": end}
        return self.output_class(loss=loss, **ends, **passthrough_outputs(outputs, self.output_class))
