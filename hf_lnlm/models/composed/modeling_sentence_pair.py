"""A masked language model that also judges pairs of texts, of any encoder family.

[1] Devlin et al. 2019, "BERT: Pre-training of deep bidirectional transformers", §3.1: C, the last hidden state of the
    first token, goes through a dense layer and tanh to two classes.

Loss: mean over masked tokens of −log p(token) + mean over pairs of −log p(label).
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import ModelOutput, can_return_tuple

from ...nn.loss_heads import IGNORED, check_labels
from ..parts import build_part, hidden_width
from .configuration_composed import plain_config
from .configuration_sentence_pair import SentencePairConfig
from .modeling_composed import ComposedModel, sum_of_means


@dataclass
class SentencePairOutput(ModelOutput):
    """Output of `SentencePairForPreTraining`.

    Args:
        loss: both terms, given labels.
        prediction_logits: `(batch, length, vocabulary)`.
        seq_relationship_logits: `(batch, 2)`.
        sums: `(2,)` summed loss of masked tokens and pairs, nats.
        hidden_states, attentions: the encoder's, if asked for.
    """

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    sums: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class SentencePairForPreTraining(ComposedModel):
    """A masked language model with a pooler and a classifier of pairs.

    Args:
        config: holds the encoder's configuration.
    """

    config: SentencePairConfig

    def __init__(self, config: SentencePairConfig) -> None:
        super().__init__(config)
        self.encoder = build_part("encoder", config.encoder, "AutoModelForMaskedLM")
        width = hidden_width(config.encoder)
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, 2)
        self.reads_segments = "token_type_ids" in inspect.signature(self.encoder.forward).parameters
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        sentence_order_label: Tensor | None = None,
        **kwargs: Any,
    ) -> SentencePairOutput:
        """Fill masks and judge pairs.

        Args:
            input_ids: `(batch, length)`, `<cls> A <sep> B <sep>` with masks.
            attention_mask: `(batch, length)`, 0 at padding.
            token_type_ids: `(batch, length)`, 0 in A and 1 in B; families without segments leave it out.
            labels: `(batch, length)`, the tokens to be found, −100 elsewhere.
            next_sentence_label, sentence_order_label: `(batch,)`, 1 for a changed pair; the config says which is used.
            kwargs: for the encoder: `output_attentions` and the like.
        """
        options = {**self.asked(input_ids, attention_mask, kwargs), "attention_mask": attention_mask}
        if self.reads_segments and token_type_ids is not None:
            options["token_type_ids"] = token_type_ids
        found, first = self._encode(input_ids, options)
        relation = self.classifier(torch.tanh(self.pooler(first)))
        output = SentencePairOutput(
            None, found.logits, relation, hidden_states=found.get("hidden_states"), attentions=found.get("attentions")
        )
        given = {"next_sentence_label": next_sentence_label, "sentence_order_label": sentence_order_label}
        pairs = given[self.config.label]
        if (labels is None) != (pairs is None):
            raise ValueError(f"give labels and {self.config.label} together, got only one of them")
        if labels is not None and pairs is not None:
            self._judge(output, labels, pairs)
        return output

    def _encode(self, ids: Tensor, options: dict[str, Any]) -> tuple[Any, Tensor]:
        """The encoder's outputs, and `(batch, width)` the last hidden state of each row's first token."""
        states: list[Tensor] = []
        handle = self.encoder.base_model.register_forward_hook(lambda model, args, found: states.append(found[0]))
        try:
            found = self.encoder(input_ids=ids, **options)
        finally:
            handle.remove()
        return found, states[-1][:, 0]

    def _judge(self, output: SentencePairOutput, labels: Tensor, pairs: Tensor) -> None:
        """Add the loss of masked tokens `(batch, length)` and pairs `(batch,)`."""
        words: Any = output.prediction_logits
        judged: Any = output.seq_relationship_logits
        check_labels(labels, self.config.vocab_size, words.shape[:2])
        check_labels(pairs, 2, judged.shape[:1], self.config.label)
        sums = [
            functional.cross_entropy(
                logits.flatten(0, -2).float(), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            for logits, wanted in ((words, labels), (judged, pairs))
        ]
        output.sums = torch.stack(sums)
        output.loss = sum_of_means(sums, self.loss_items({"labels": labels, self.config.label: pairs}).values())

    def loss_items(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Masked tokens, and pairs."""
        names = {"words": "labels", "pairs": self.config.label}
        return {term: (inputs[name] != IGNORED).sum() for term, name in names.items()}

    def loss_sums(self, outputs: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Summed loss of each term."""
        words, pairs = outputs["sums"]
        return {"words": words, "pairs": pairs}


def compose(config: Any, label: str) -> Any:
    """A fresh masked language model with a pooler.

    Args:
        config: the encoder's configuration.
        label: name of the pairs' labels.
    """
    return SentencePairForPreTraining(SentencePairConfig(encoder=plain_config(config), label=label))
