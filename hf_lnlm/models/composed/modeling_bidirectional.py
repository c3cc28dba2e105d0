"""Two language models, one reading each way, that share what is about words: a biLM.

[1] Peters et al. 2018, "Deep contextualized word representations" (ELMo), §3.1.

Glossary (paper: variable): Θ_x, Θ_s, embedding and softmax, shared; →Θ_LSTM `forwards`, ←Θ_LSTM `backwards`.
Loss: the mean of −Σ log p(t_k | t_1 … t_k−1) and −Σ log p(t_k | t_k+1 … t_N), each over the tokens it predicts.

The backward model is a model of the same family that is given each row in reverse: its real tokens change places, its
padding stays where it is. It works with any causal family, whatever is inside. No direction sees the token it predicts
at any depth, unlike the layers of a bidirectional encoder.

Deviation: [1] carries the state of 20 tokens to the next batch; here every row begins anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.utils import ModelOutput, can_return_tuple

from ...nn.loss_heads import IGNORED, check_labels
from ..parts import build_part, name_of
from .configuration_bidirectional import BidirectionalConfig
from .configuration_composed import plain_config
from .modeling_composed import ComposedModel, sum_of_means


@dataclass
class BidirectionalOutput(ModelOutput):
    """Output of `BidirectionalForPreTraining`.

    Args:
        loss: mean of both directions, nats a token, given labels.
        logits: `(batch, length, vocabulary)`, of the token after each position.
        backward_logits: `(batch, length, vocabulary)`, of the token before each position.
        hidden_states, backward_hidden_states: of each layer `(batch, length, width)`, if asked for; side by side they
            are ELMo's layers.
        sums: `(2,)` summed loss of each direction, nats.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    backward_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    backward_hidden_states: tuple[Tensor | None, ...] | None = None
    sums: Tensor | None = None


class BidirectionalForPreTraining(ComposedModel):
    """A forward and a backward language model with one embedding and one softmax.

    Args:
        config: holds both parts' configurations.
    """

    config: BidirectionalConfig

    def __init__(self, config: BidirectionalConfig) -> None:
        super().__init__(config)
        self.forwards = build_part("forwards", config.forwards, "AutoModelForCausalLM")
        self.backwards = build_part("backwards", config.backwards, "AutoModelForCausalLM")
        if config.tie_word_embeddings:
            self.tie_parts(self._shared())
        self.post_init()

    def _shared(self) -> dict[str, str]:
        """Names of the parameters of embedding and output, which the backward model takes from the forward one."""
        tied = {}
        for layer in (self.backwards.get_input_embeddings(), self.backwards.get_output_embeddings()):
            if layer is None:  # an adaptive softmax belongs to its direction
                continue
            at = name_of(layer, self.backwards)
            for name, _ in layer.named_parameters():
                tied[f"backwards.{at}.{name}"] = f"forwards.{at}.{name}"
        own = getattr(self.backwards, "all_tied_weights_keys", {})
        return {name: source for name, source in tied.items() if name.removeprefix("backwards.") not in own}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> BidirectionalOutput:
        """Read both ways.

        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, length)`, 0 at padding; None if there is none.
            labels: `(batch, length)`, the input ids, −100 where nothing is predicted; shifted inside.
            kwargs: for both models: `output_hidden_states`.
        """
        options = {
            **self.asked(input_ids, attention_mask, kwargs),
            "attention_mask": attention_mask,
            "use_cache": False,
        }
        order = reversal(input_ids, attention_mask)
        ahead = self.forwards(input_ids=input_ids, **options)
        back = self.backwards(input_ids=input_ids.gather(1, order), **options)
        output = BidirectionalOutput(logits=ahead.logits, backward_logits=in_order(back.logits, order))
        output.hidden_states = ahead.hidden_states
        if back.hidden_states is not None:  # None also stands for a layer that wasn't asked for
            turned = (None if states is None else in_order(states, order) for states in back.hidden_states)
            output.backward_hidden_states = tuple(turned)
        if labels is not None:
            check_labels(labels, self.config.vocab_size, input_ids.shape)
            sums = [summed_loss(ahead.logits, labels), summed_loss(back.logits, labels.gather(1, order))]
            output.sums = torch.stack(sums)
            counts = self.loss_items({"labels": labels, "attention_mask": attention_mask}).values()
            output.loss = sum_of_means(self.loss_sums(output, {}).values(), counts)
        return output

    def loss_items(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tokens that each direction predicts."""
        labels = inputs["labels"]
        turned = labels.gather(1, reversal(labels, inputs.get("attention_mask")))
        return {"forwards": (labels[:, 1:] != IGNORED).sum(), "backwards": (turned[:, 1:] != IGNORED).sum()}

    def loss_sums(self, outputs: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Half the summed loss of each direction, so that the loss is their mean."""
        ahead, back = outputs["sums"] / 2
        return {"forwards": ahead, "backwards": back}


def reversal(ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Where each position of the reversed rows comes from; its own inverse.

    Args:
        ids: `(batch, length)`, for shape and device.
        attention_mask: `(batch, length)`; zeros keep their place.

    Returns:
        indices `(batch, length)`.
    """
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if attention_mask is None:
        return places.flip(1)
    real = attention_mask.bool()
    first = (~real).long().argsort(dim=1, stable=True)  # the real positions, in order, then the others
    count = real.sum(1, keepdim=True)
    rank = torch.where(places < count, count - 1 - places, places)
    return torch.empty_like(first).scatter_(1, first, first.gather(1, rank))


def in_order(values: Tensor, order: Tensor) -> Tensor:
    """Values of reversed rows `(batch, length, width)` in the order of the text."""
    return values.gather(1, order[..., None].expand_as(values))


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed loss, nats, of logits `(batch, length, vocabulary)` that predict the next label `(batch, length)`."""
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def compose(config: Any) -> Any:
    """A fresh biLM of two causal models of one configuration."""
    both = BidirectionalConfig(forwards=plain_config(config), backwards=plain_config(config))
    return BidirectionalForPreTraining(both)
