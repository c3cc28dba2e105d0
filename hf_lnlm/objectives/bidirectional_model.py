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
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.utils import ModelOutput

from ..models.base import strict_config
from .composed import ComposedConfig, ComposedModel, name_of, plain_config, register_composed, sum_of_means

IGNORED = -100


@strict_config
class BidirectionalConfig(ComposedConfig):
    """Configuration of `BidirectionalForPreTraining`.

    Args:
        parts: configurations of `forwards` and `backwards`, causal models of one vocabulary.
    """

    model_type = "lnlm_bidirectional"
    main_part: ClassVar[str] = "forwards"
    is_causal: ClassVar[bool] = True
    keys_to_ignore_at_inference = ["backward_logits", "hidden_states", "sums"]


@dataclass
class BidirectionalOutput(ModelOutput):
    """Output of `BidirectionalForPreTraining`.

    Args:
        loss: mean of both directions, nats a token, given labels.
        logits: `(batch, length, vocabulary)`, of the token after each position.
        backward_logits: `(batch, length, vocabulary)`, of the token before each position.
        hidden_states: for each layer `(batch, length, 2 width)`, both directions side by side, if asked for.
        sums: `(2,)` summed loss of each direction, nats.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    backward_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    sums: Tensor | None = None


class BidirectionalForPreTraining(ComposedModel):
    """A forward and a backward language model with one embedding and one softmax.

    Args:
        config: holds both parts' configurations.
    """

    config: BidirectionalConfig
    part_names = ("forwards", "backwards")

    def __init__(self, config: BidirectionalConfig) -> None:
        super().__init__(config)
        self.forwards = AutoModelForCausalLM.from_config(config.part("forwards"))
        self.backwards = AutoModelForCausalLM.from_config(config.part("backwards"))
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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> BidirectionalOutput:
        """Read both ways.

        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, length)`, 0 at padding; None if there is none.
            labels: `(batch, length)`, the input ids, −100 where nothing is predicted; shifted inside.
            output_hidden_states: whether hidden states are returned (ELMo's layers).
        """
        order = reversal(input_ids, attention_mask)
        options = {"attention_mask": attention_mask, "output_hidden_states": output_hidden_states, "use_cache": False}
        ahead = self.forwards(input_ids=input_ids, **options)
        back = self.backwards(input_ids=input_ids.gather(1, order), **options)
        output = BidirectionalOutput(logits=ahead.logits, backward_logits=in_order(back.logits, order))
        if output_hidden_states:
            pairs = zip(ahead.hidden_states, back.hidden_states, strict=True)
            output.hidden_states = tuple(torch.cat([a, in_order(b, order)], -1) for a, b in pairs)
        if labels is not None:
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
    parts = {name: plain_config(config) for name in BidirectionalForPreTraining.part_names}
    return BidirectionalForPreTraining(BidirectionalConfig(parts=parts))


register_composed(BidirectionalConfig, BidirectionalForPreTraining)
