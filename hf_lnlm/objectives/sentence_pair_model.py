"""A masked language model that also judges pairs of texts, of any encoder family.

[1] Devlin et al. 2019, "BERT: Pre-training of deep bidirectional transformers", §3.1: C, the last hidden state of the
    first token, goes through a dense layer and tanh to two classes.

Loss: mean over masked tokens of −log p(token) + mean over pairs of −log p(label).
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForMaskedLM
from transformers.utils import ModelOutput

from ..models.base import strict_config
from .composed import ComposedConfig, ComposedModel, plain_config, register_composed, sum_of_means
from .replaced_token_model import hidden_width

IGNORED = -100


@strict_config
class SentencePairConfig(ComposedConfig):
    """Configuration of `SentencePairForPreTraining`.

    Args:
        parts: configuration of the `encoder`.
        label: name of the pairs' labels, `next_sentence_label` or `sentence_order_label`.
    """

    model_type = "lnlm_sentence_pair"
    main_part: ClassVar[str] = "encoder"
    keys_to_ignore_at_inference = ["sums"]

    label: str = "next_sentence_label"


@dataclass
class SentencePairOutput(ModelOutput):
    """Output of `SentencePairForPreTraining`.

    Args:
        loss: both terms, given labels.
        prediction_logits: `(batch, length, vocabulary)`.
        seq_relationship_logits: `(batch, 2)`.
        sums: `(2,)` summed loss of masked tokens and pairs, nats.
    """

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    sums: Tensor | None = None


class SentencePairForPreTraining(ComposedModel):
    """A masked language model with a pooler and a classifier of pairs.

    Args:
        config: holds the encoder's configuration.
    """

    config: SentencePairConfig
    part_names = ("encoder",)

    def __init__(self, config: SentencePairConfig) -> None:
        super().__init__(config)
        inner = config.part("encoder")
        self.encoder = AutoModelForMaskedLM.from_config(inner)
        width = hidden_width(inner)
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, 2)
        self.reads_segments = "token_type_ids" in inspect.signature(self.encoder.forward).parameters
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        sentence_order_label: Tensor | None = None,
    ) -> SentencePairOutput:
        """Fill masks and judge pairs.

        Args:
            input_ids: `(batch, length)`, `<cls> A <sep> B <sep>` with masks.
            attention_mask: `(batch, length)`, 0 at padding.
            token_type_ids: `(batch, length)`, 0 in A and 1 in B; families without segments leave it out.
            labels: `(batch, length)`, the tokens to be found, −100 elsewhere.
            next_sentence_label, sentence_order_label: `(batch,)`, 1 for a changed pair; the config says which is used.
        """
        options = {"attention_mask": attention_mask, "output_hidden_states": True}
        if self.reads_segments and token_type_ids is not None:
            options["token_type_ids"] = token_type_ids
        found = self.encoder(input_ids=input_ids, **options)
        pooled = torch.tanh(self.pooler(found.hidden_states[-1][:, 0]))
        relation = self.classifier(pooled)
        output = SentencePairOutput(None, found.logits, relation)
        given = {"next_sentence_label": next_sentence_label, "sentence_order_label": sentence_order_label}
        pairs = given[self.config.label]
        if labels is not None and pairs is not None:
            words = functional.cross_entropy(
                found.logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            judged = functional.cross_entropy(relation.float(), pairs, ignore_index=IGNORED, reduction="sum")
            output.sums = torch.stack([words, judged])
            items = self.loss_items({"labels": labels, self.config.label: pairs}).values()
            output.loss = sum_of_means(output.sums, items)
        return output

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
    return SentencePairForPreTraining(SentencePairConfig(parts={"encoder": plain_config(config)}, label=label))


register_composed(SentencePairConfig, SentencePairForPreTraining)
