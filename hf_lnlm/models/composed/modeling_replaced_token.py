"""Generator and discriminator of replaced-token detection, made of any two encoder families.

[1] Clark et al. 2020, "ELECTRA: Pre-training text encoders as discriminators rather than generators", §2 and §3.2.

Glossary: G *generator*, a masked language model; D *discriminator*; x tokens, x_masked with a share of them masked,
x_corrupt with samples of G in their place; T temperature; λ = `weight`.
Loss (§2): −Σ log p_G(x_i | x_masked) / masked tokens + λ · Σ BCE(D(x_corrupt, t), x_corrupt_t ≠ x_t) / tokens that are
no padding. A sample that happens to be right counts as original. Samples carry no gradient, so D's loss reaches G only
through embeddings that both share.

Sampling inverts the distribution function: position t takes the first token whose cumulated probability exceeds u_t, a
number of the batch (`uniforms`). The samples are exactly the softmax's, and a function of the example alone.

Shared embeddings (§3.2). Equal widths: one table, and whatever else the two embedding modules have in equal shapes
(positions, segments, layer norm). Otherwise G's table is the shared one times a projection P, both where G reads and
where its output is tied to it: logits = (h Pᵀ) Eᵀ. Families that have an embedding width of their own
(ELECTRA, ALBERT, the RNN) are given D's, and project inside.

Deviation: [1] ties the table of the output through the projection's own layer; here it is the same P.
Cost of a step: G on all tokens, its softmax on the masked ones only, and D on all tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from ...nn.loss_heads import IGNORED, check_labels
from ..heads import passthrough_outputs
from ..parts import build_part, hidden_width, name_of, part_class
from .configuration_composed import plain_config
from .configuration_replaced_token import ReplacedTokenConfig
from .modeling_composed import ComposedModel, sum_of_means

OWN_PREFIX = "lnlm_"


@dataclass
class ReplacedTokenOutput(ModelOutput):
    """Output of `ReplacedTokenForPreTraining`.

    Args:
        loss: the two terms together, given labels.
        logits: `(batch, length)`, the discriminator's; positive for replaced.
        corrupted: `(batch, length)` token ids that the discriminator read.
        replaced: `(batch, length)`, 1 where the discriminator was to find another token, else 0.
        generator_logits: `(masked tokens, vocabulary)`.
        sums: `(2,)` summed loss of generator and (without its weight) discriminator, in nats.
        hidden_states, attentions: the discriminator's, if asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    corrupted: Tensor | None = None
    replaced: Tensor | None = None
    generator_logits: Tensor | None = None
    sums: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class ProjectedEmbedding(nn.Module):
    """A narrow embedding as a wide table times a projection.

    Args:
        table: the wide one, `(vocabulary, wide)`.
        width: of the vectors given out.
        scale: factor of the vectors, as of the embedding that this replaces.
    """

    def __init__(self, table: nn.Parameter, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight, self.embed_scale = table, scale
        self.projection = nn.Linear(table.shape[1], width, bias=False)
        self.num_embeddings, self.embedding_dim = table.shape[0], width

    def forward(self, ids: Tensor) -> Tensor:
        """`(…)` ids → `(…, width)`."""
        found = self.projection(functional.embedding(ids, self.weight))
        return found if self.embed_scale == 1 else found * self.embed_scale

    def resize(self, table: nn.Parameter) -> None:
        """Read another table, `(vocabulary, wide)`."""
        self.weight, self.num_embeddings = table, table.shape[0]

    def folded(self) -> Tensor:
        """The narrow table that this stands for, `(vocabulary, width)`."""
        return self.weight @ self.projection.weight.T


class ProjectedOutput(nn.Module):
    """The output that is tied to a `ProjectedEmbedding`: `h` → `(h Pᵀ) Eᵀ + b`.

    Args:
        embedding: what it is tied to.
        bias: `(vocabulary,)` or None.
    """

    def __init__(self, embedding: ProjectedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.projection = nn.Linear(embedding.weight.shape[1], embedding.embedding_dim, bias=False)
        self.bias = bias

    def resize(self, table: nn.Parameter) -> None:
        """Be tied to another table, `(vocabulary, wide)`."""
        self.weight = table

    def forward(self, hidden: Tensor) -> Tensor:
        """`(…, width)` → logits `(…, vocabulary)`."""
        return functional.linear(functional.linear(hidden, self.projection.weight.T), self.weight, self.bias)


class DiscriminatorHead(nn.Module):
    """The head of [1]: dense layer, activation, one logit a token.

    Args:
        width: of the hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(batch, length, width)` → `(batch, length)`."""
        return self.out(functional.gelu(self.dense(hidden))).squeeze(-1)


class ReplacedTokenForPreTraining(ComposedModel):
    """A generator that fills masks and a discriminator that finds what it filled in.

    Args:
        config: holds both parts' configurations.
    """

    config: ReplacedTokenConfig

    def __init__(self, config: ReplacedTokenConfig) -> None:
        super().__init__(config)
        self.generator = build_part("generator", config.generator, "AutoModelForMaskedLM")
        inner: Any = config.discriminator
        own_head = detects(inner)
        self.discriminator = build_part("discriminator", inner, "AutoModelForPreTraining" if own_head else "AutoModel")
        self.head = None if own_head else DiscriminatorHead(hidden_width(inner))
        if config.tie_word_embeddings:
            self._share_embeddings()
        self.post_init()

    def _share_embeddings(self) -> None:
        mine, theirs = self.generator.get_input_embeddings(), self.discriminator.get_input_embeddings()
        at, source = (f"{part}.{name_of(table, getattr(self, part))}" for part, table in self._tables().items())
        tied = {f"{at}.weight": f"{source}.weight"}
        if mine.weight.shape == theirs.weight.shape:
            tied |= self._shared_neighbours(at.rpartition(".")[0], source.rpartition(".")[0])
        else:
            tied |= self._project(at, theirs.weight)
        self.tie_parts(tied)

    def _tables(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name).get_input_embeddings() for name in self.config.sub_configs}

    def _shared_neighbours(self, mine: str, theirs: str) -> dict[str, str]:
        """Names of what else two embedding modules of one class have in equal shapes (positions, layer norm)."""
        first, second = self.get_submodule(mine), self.get_submodule(theirs)
        if type(first) is not type(second) or isinstance(first, PreTrainedModel):
            return {}
        shapes = {name: value.shape for name, value in second.named_parameters()}
        same = [name for name, value in first.named_parameters() if shapes.get(name) == value.shape]
        return {f"{mine}.{name}": f"{theirs}.{name}" for name in same}

    def _project(self, at: str, table: nn.Parameter) -> dict[str, str]:
        """Give the generator a projected view of the shared table; returns what else is tied by that."""
        own = self.generator.get_input_embeddings()
        embedding = ProjectedEmbedding(table, own.weight.shape[1], float(getattr(own, "embed_scale", 1.0)))
        output = self.generator.get_output_embeddings()
        tied = bool(self.generator.config.tie_word_embeddings) and output is not None
        self.generator.set_input_embeddings(embedding)
        if not tied:
            return {}
        name = f"generator.{name_of(output, self.generator)}"
        self.set_submodule(name, ProjectedOutput(embedding, getattr(output, "bias", None)))
        return {f"{name}.projection.weight": f"{at}.projection.weight"}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        uniforms: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> ReplacedTokenOutput:
        """Fill the masks, then find what was filled in.

        Args:
            input_ids: `(batch, length)`; with masks if labels are given, else any text to look at.
            attention_mask: `(batch, length)`, 0 at padding; None if there is none.
            labels: `(batch, length)`, the original token where one was chosen, −100 elsewhere.
            uniforms: `(batch, length)` numbers in [0, 1) that the samples are drawn with; if None, fresh ones while
                training and the same every time in evaluation.
            token_type_ids: `(batch, length)` segments, for families that have them.
            kwargs: for the discriminator: `output_hidden_states` and the like.

        Returns:
            Without labels, logits only: how sure the discriminator is that each token of `input_ids` was replaced.
        """
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        rest = {name: value for name, value in given.items() if value is not None}
        asked = self.asked(input_ids, attention_mask, kwargs)
        if labels is None:
            return self._detect(input_ids, rest, asked)
        check_labels(labels, self.config.vocab_size, input_ids.shape)
        wanted = labels != IGNORED
        logits = logits_at(self.generator, wanted, {"input_ids": input_ids, **rest})
        drawn = self._uniforms(wanted) if uniforms is None else uniforms
        original = torch.where(wanted, labels, input_ids)
        corrupted = original.clone()
        corrupted[wanted] = sample(logits, drawn[wanted], self.config.temperature)
        output: Any = self._detect(corrupted, rest, asked)
        output.corrupted, output.replaced, output.generator_logits = corrupted, (corrupted != original).long(), logits
        each = functional.binary_cross_entropy_with_logits(
            output.logits.float(), output.replaced.float(), reduction="none"
        )
        each = each * tokens_that_count(labels, attention_mask)
        output.sums = torch.stack(
            [functional.cross_entropy(logits.float(), labels[wanted], reduction="sum"), each.sum()]
        )
        items = self.loss_items({"labels": labels, "attention_mask": attention_mask}).values()
        output.loss = sum_of_means(self.loss_sums(output, {}).values(), items)
        return output

    def _uniforms(self, wanted: Tensor) -> Tensor:
        source = None if self.training else torch.Generator(wanted.device).manual_seed(0)
        return torch.rand(wanted.shape, device=wanted.device, generator=source)

    def _detect(self, ids: Tensor, rest: dict[str, Tensor], asked: Any) -> ReplacedTokenOutput:
        outputs = self.discriminator(input_ids=ids, **rest, **asked)
        logits = outputs.logits if self.head is None else self.head(outputs.last_hidden_state)
        return ReplacedTokenOutput(**passthrough_outputs(outputs, ReplacedTokenOutput) | {"logits": logits})

    def loss_items(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Items of each term: masked tokens, and all tokens that are no padding."""
        labels, mask = inputs["labels"], inputs.get("attention_mask")
        return {"generator": (labels != IGNORED).sum(), "discriminator": tokens_that_count(labels, mask).sum()}

    def loss_sums(self, outputs: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Summed loss of each term, the discriminator's times its weight."""
        generator, discriminator = outputs["sums"]
        return {"generator": generator, "discriminator": self.config.weight * discriminator}

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Resize the embeddings and outputs of both; a projected table is the discriminator's."""
        if not isinstance(self.generator.get_input_embeddings(), ProjectedEmbedding):
            return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        table = self.discriminator.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.config.vocab_size = self.vocab_size = table.weight.shape[0]
        for module in self.generator.modules():
            if isinstance(module, (ProjectedEmbedding, ProjectedOutput)):
                module.resize(table.weight)
        output = self.generator.get_output_embeddings()
        if isinstance(output, ProjectedOutput) and output.bias is not None:
            _replace(self.generator, output.bias, _resized(output.bias, self.vocab_size))
        return table

    def start_from(self, encoder: PreTrainedModel) -> None:
        """Take over the weights of an encoder: the discriminator its layers, and an equal generator all of it.

        A generator of another size keeps its own weights. With both taken over this is the second stage of [1], §3.3.

        Args:
            encoder: a model of the discriminator's configuration, with a masked language model's head or without.
        """
        super().start_from(encoder)
        held = encoder.base_model.state_dict()
        shapes = {name: value.shape for name, value in self.generator.base_model.state_dict().items()}
        if all(name in held and held[name].shape == shape for name, shape in shapes.items()):
            self.generator.base_model.load_state_dict(held, strict=False)
            if type(encoder) is type(self.generator):
                self.generator.load_state_dict(encoder.state_dict(), strict=False)

    def part_to_save(self, name: str) -> PreTrainedModel:
        """The part by itself; a generator with a projected table gets the table that the projection stands for."""
        part = getattr(self, name)
        table = part.get_input_embeddings()
        if not isinstance(table, ProjectedEmbedding):
            return part
        alone = build_part(name, self.config.part(name), "AutoModelForMaskedLM").to(part.dtype)
        projected = [
            n for n, module in part.named_modules() if isinstance(module, (ProjectedEmbedding, ProjectedOutput))
        ]
        wide = {f"{n}.{tensor}" for n in projected for tensor in ("weight", "projection.weight")}
        own = {key: value for key, value in part.state_dict().items() if key not in wide}
        own[f"{name_of(table, part)}.weight"] = table.folded().detach()
        alone.load_state_dict(own, strict=False)  # the output is tied to the table
        return alone


def _resized(bias: nn.Parameter, size: int) -> nn.Parameter:
    """A bias `(vocabulary,)` for another vocabulary; new tokens get none."""
    kept = bias.detach()[:size]
    return nn.Parameter(functional.pad(kept, (0, size - len(kept))), requires_grad=bias.requires_grad)


def _replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in the place of another, wherever that stands."""
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if value is old:
                setattr(module, name, new)


def tokens_that_count(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Tokens that the discriminator is judged by: all but padding, and but rows without labels.

    Args:
        labels: `(batch, length)`; rows that only fill up a process's last batch have none.
        attention_mask: `(batch, length)`, or None.

    Returns:
        booleans `(batch, length)`.
    """
    kept = (labels != IGNORED).any(1, keepdim=True).expand_as(labels)
    return kept if attention_mask is None else kept & attention_mask.bool()


def logits_at(model: Any, wanted: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of a masked language model at some positions; its output layer sees no others.

    Args:
        model: the masked language model.
        wanted: booleans `(batch, length)`.
        inputs: what its `forward` takes.

    Returns:
        `(wanted positions, vocabulary)`.
    """
    output = model.get_output_embeddings()
    if output is None:
        return model(**inputs).logits[wanted]
    handle = output.register_forward_pre_hook(lambda module, args: (args[0][wanted], *args[1:]))
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    return logits if logits.dim() == 2 else logits[wanted]


@torch.no_grad()
def sample(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Draw a token from each softmax by inverting its distribution function.

    Args:
        logits: `(positions, vocabulary)`.
        uniforms: `(positions,)` in [0, 1).
        temperature: T.

    Returns:
        ids `(positions,)`; no gradient goes through them.
    """
    cumulated = (logits.float() / temperature).softmax(-1).cumsum(-1)
    at = (uniforms.to(cumulated) * cumulated[:, -1])[:, None]
    return torch.searchsorted(cumulated, at, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def detects(config: Any) -> bool:
    """Whether a family's own pre-training head is a discriminator: ELECTRA's is, and of the package's own every one."""
    own = config.model_type.startswith(OWN_PREFIX) and part_class(config, "AutoModelForPreTraining") is not None
    return own or config.model_type == "electra"


def compose(generator: Any, discriminator: Any, *, shared: bool, temperature: float, weight: float) -> Any:
    """A fresh generator and discriminator of two configurations.

    Args:
        generator, discriminator: their configurations.
        shared: whether they share embeddings.
        temperature: T.
        weight: λ.
    """
    config = ReplacedTokenConfig(
        generator=plain_config(generator), discriminator=plain_config(discriminator),
        tie_word_embeddings=shared, temperature=temperature, weight=weight,
        initializer_range=getattr(discriminator, "initializer_range", 0.02),
    )  # fmt: skip
    return ReplacedTokenForPreTraining(config)
