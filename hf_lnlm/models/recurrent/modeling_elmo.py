"""ELMo: word vectors from a language model in both directions over a character CNN.

References:
    [1] Peters et al. 2018, "Deep contextualized word representations".
    [2] Jozefowicz et al. 2016, "Exploring the Limits of Language Modeling" (the LSTMs and the character CNN).

Glossary (paper symbol: variable): x_k, a word's vector: `vectors`; h_{k,j}, layer j's output, both directions side by side,
h_{k,0} = [x_k; x_k]: `layers`; s_j, gamma: `mix`.

What the model reads is a stream of ELMo's own character ids, as the tokenizer of kind `elmo` gives them: one id that
begins each word, then its bytes. So padding, masks, collators, pipelines and labels a token are transformers' own. The
outputs of a word stand at each of its positions. Spelled words `(batch, words, 50)`, AllenNLP's input, do as well.

Deliberate deviations:
    * The published code carries the state from batch to batch. Here each batch begins anew unless a state is given.
    * The softmax of pre-training has no vocabulary: words are hashed to its classes. So every word is a target, rare ones
      share a class with others, and perplexities do not compare with those of a vocabulary.
    * A word that several rows hold is encoded once, and only the places that a batch's longest word takes.

Complexity: O(words * (width * cells)) a layer and direction, and the character CNN once for each different word.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_torchdynamo_compiling

from ...nn.character_cnn import CharacterCNN, Highway
from ...nn.inputs import check_given, check_ids, check_keywords, take_cache
from ...nn.loss_heads import IGNORED, check_labels, chunked_loss, normalised
from ...nn.masks import current_mask
from ...nn.scalar_mix import ScalarMix
from ...nn.words import Words, distinct, find_words, justified_words, spelling_keys
from ..base import LNLMPreTrainedModel
from ..heads import Head, SequenceClassificationHead, TokenClassificationHead, passthrough_outputs
from .configuration_elmo import SYMBOLS, ElmoConfig
from .layers import summed_up
from .projected_lstm import BiLMLayer, ProjectedLSTM, init_projected_lstm, plan_runs

GATE_BIAS = -2.0
"""Initial bias of the highways' gates: at first most of a feature is carried on."""


@dataclass
class ElmoModelOutput(BaseModelOutput):
    """Output of `ElmoModel`.

    Args:
        last_hidden_state: `(batch, length, hidden_size)`, the last layer, both directions side by side; zero at padding.
        hidden_states: of each layer, [x; x] first, if asked for.
        final_state: h `(layers, 2, batch, hidden_size / 2)` and c `(layers, 2, batch, cell_size)`, forward direction
            first, if a state was given or `output_state=True`.
        layers: of each layer `(batch, words, hidden_size)`, one vector a word.
        word_mask: `(batch, words)` 1 where there is a word, else 0.
        word_index: `(batch, length)` the word of each position; the number of words where it is masked.
    """

    final_state: tuple[Tensor, Tensor] | None = None
    layers: tuple[Tensor, ...] | None = None
    word_mask: Tensor | None = None
    word_index: Tensor | None = None


@dataclass
class ElmoForPreTrainingOutput(ModelOutput):
    """Output of `ElmoForPreTraining`.

    Args:
        loss: mean of both directions, nats a predicted word, given labels.
        logits: `(batch, words, target_vocab_size)`, of the word after each word; None while training.
        backward_logits: the same of the word before each word.
        hidden_states: see `ElmoModelOutput`.
        sums: `(2,)` summed loss of each direction, nats.
        counts: `(2,)` words that each direction predicts.
        correct: `(2,)` those of them that it finds; None while training.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    backward_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    sums: Tensor | None = None
    counts: Tensor | None = None
    correct: Tensor | None = None


class Spelled(NamedTuple):
    """The words of a batch.

    Attributes:
        ids: `(batch, words, W)` their spelling, or None if embeddings were given.
        embeddings: `(batch, words, W, width)` of their characters where those were given, else None.
        mask: `(batch, words)` true where there is a word.
        owner: `(batch, length)` the word of each position; the number of words where it is masked.
    """

    ids: Tensor | None
    embeddings: Tensor | None
    mask: Tensor
    owner: Tensor


class ElmoPreTrainedModel(LNLMPreTrainedModel):
    """Weight initialisation and traits that ELMo's models share."""

    config: ElmoConfig
    _no_split_modules = ["BiLMLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ProjectedLSTM):
            init_projected_lstm(module)
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -1.0, 1.0)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, ScalarMix):
            init.zeros_(module.weights)
            init.ones_(module.scale)
        elif isinstance(module, CharacterCNN):
            for layer in (*module.convolutions, module):
                projection = layer.get_submodule("projection")
                init.normal_(projection.get_parameter("weight"), std=projection.in_features**-0.5)
        elif isinstance(module, Highway):
            for layer, bias in ((module.transform, 0.0), (module.gate, GATE_BIAS)):
                init.normal_(layer.weight, std=layer.in_features**-0.5)
                init.constant_(layer.bias, bias)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the characters' embeddings, as in transformers.

        Raises:
            ValueError: the symbols that every word is spelled with, or a sentence's begin and end, would be lost.
        """
        least = 1 + max(*(getattr(self.config, name) for name in SYMBOLS), *self.config.single_ids)
        if new_num_tokens is not None and new_num_tokens < least:
            raise ValueError(f"words are spelled with ids up to {least - 1}: they need {least}, got {new_num_tokens}")
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)


class ElmoModel(ElmoPreTrainedModel):
    """Character CNN and the layers of both directions, without a head.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        self.characters = CharacterCNN(
            config.embedding_size,
            config.filters,
            config.num_highways,
            config.activation,
            config.projection_size,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([BiLMLayer(config, i) for i in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        state: tuple[Tensor, Tensor] | None = None,
        output_state: bool = False,
        **kwargs: Any,
    ) -> ElmoModelOutput:
        """Run the model.

        Args:
            input_ids: `(batch, length)` characters, of which `word_start_token_id` begins a word; or spelled words
                `(batch, words, max_word_length)`, where a row of zeros is padding. Then a position is a word.
            attention_mask: `(batch, length)`, zero at padding, which may lie anywhere.
            inputs_embeds: `(batch, length, embedding_size)` embeddings of characters in place of ids; a word begins
                where one is exactly that of `word_start_token_id`.
            state: what an earlier batch of as many rows gave as `final_state`.
            output_state: whether to return the state after the batch.
            kwargs: `output_hidden_states`.

        Raises:
            ValueError: inputs, mask or state do not fit each other or the config.
        """
        if take_cache(kwargs.pop("past_key_values", None), kwargs) is not None:
            raise ValueError("a model that reads both ways reads whole sequences: past_key_values must be None")
        check_keywords(kwargs)
        words = self.spelled(input_ids, attention_mask, inputs_embeds)
        wanted = kwargs.get("output_hidden_states")
        wanted = self.config.output_hidden_states if wanted is None else wanted
        layers, hidden_states, final = self._run(words, bool(wanted), state)
        return ElmoModelOutput(
            last_hidden_state=hidden_states[-1],
            hidden_states=hidden_states if wanted else None,
            final_state=final if output_state or state is not None else None,
            layers=layers,
            word_mask=words.mask.long(),
            word_index=words.owner,
        )

    def spelled(self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None) -> Spelled:
        """Return a batch's words; see `forward` for the arguments."""
        if input_ids is not None and input_ids.dim() == 3 and inputs_embeds is None:
            return self._given_words(input_ids, attention_mask)
        check_given(input_ids, inputs_embeds, self.config.embedding_size, self.dtype)
        stream: Any = input_ids if inputs_embeds is None else inputs_embeds
        if input_ids is not None:
            check_ids(input_ids, self.embed_tokens.num_embeddings)
        batch, length = stream.shape[:2]
        mask = current_mask(attention_mask, batch, length)
        real = torch.ones(batch, length, dtype=torch.bool, device=stream.device) if mask is None else mask
        found = self._found(stream, real.to(stream.device))
        symbols = stream.new_tensor(self._symbols()) if inputs_embeds is None else self._embedded_symbols()
        extended = torch.cat([stream, symbols.to(stream.dtype).expand(batch, *symbols.shape)], dim=1)
        rows = torch.arange(batch, device=stream.device)[:, None, None]
        characters = extended[rows, found.sources]
        if inputs_embeds is None:
            return Spelled(characters, None, found.mask, found.owner)
        return Spelled(None, characters, found.mask, found.owner)

    def _symbols(self) -> list[Any]:
        return [getattr(self.config, name) for name in SYMBOLS]

    def _embedded_symbols(self) -> Tensor:
        return self.embed(torch.tensor(self._symbols(), device=self.embed_tokens.weight.device))

    def _found(self, stream: Tensor, real: Tensor) -> Words:
        config = self.config
        if stream.dim() == 2:
            marker, single = stream == self._symbols()[0], torch.zeros_like(real)
            for token in config.single_ids:
                single = single | (stream == token)
        else:
            ids = torch.tensor([self._symbols()[0], *config.single_ids], device=stream.device)
            table = self.embed(ids).detach()
            marker = (stream == table[0]).all(-1)
            single = (stream[:, :, None] == table[1:]).all(-1).any(-1)
        single = single & ~marker
        traced = is_torchdynamo_compiling()
        return find_words(marker, single, real, config.max_word_length, max(config.filter_sizes), traced)

    def _given_words(self, ids: Tensor, attention_mask: Tensor | None) -> Spelled:
        places = self.config.max_word_length
        if ids.shape[2] != places:
            raise ValueError(
                f"input_ids must have shape (batch, length) or (batch, words, {places}), got {tuple(ids.shape)}"
            )
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be whole numbers (int64 or int32), got {ids.dtype}")
        if 0 in ids.shape[:2]:
            lacks = "rows" if ids.shape[0] == 0 else "positions"
            raise ValueError(f"the input has no {lacks}: input_ids has shape {tuple(ids.shape)}")
        check_ids(ids, self.embed_tokens.num_embeddings)
        mask = current_mask(attention_mask, *ids.shape[:2])
        order, real, index = justified_words(ids[:, :, 0] > 0 if mask is None else mask)
        return Spelled(ids.gather(1, order[:, :, None].expand_as(ids)), None, real, index)

    def word_vectors(self, words: Spelled) -> Tensor:
        """Return x `(batch, words, hidden_size / 2)`; of each different word once."""
        mask = words.mask
        if words.ids is None or is_torchdynamo_compiling():
            characters = words.embeddings if words.embeddings is not None else self.embed(words.ids)  # type: ignore[arg-type]
            return self.characters(characters.flatten(0, 1)).view(*mask.shape, -1) * mask[..., None]
        flat = words.ids[mask]
        if not len(flat):
            return self.embed_tokens.weight.new_zeros(*mask.shape, self.config.projection_size)
        once, which = distinct(flat, int(self.config.filler_token_id or 0))
        vectors = self.characters(self.embed(once))
        index = torch.full(mask.shape, len(once), device=mask.device).masked_scatter(mask, which)
        return torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])[index]

    def _run(
        self, words: Spelled, wanted: bool, state: tuple[Tensor, Tensor] | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, Tensor]]:
        """Return each layer's output a word, the hidden states a position (the last alone unless wanted), the final state.

        Hidden states that are wanted lie on the way to what follows, so that gradients reach them.
        """
        vectors = self.word_vectors(words)
        runs = plan_runs(words.mask, is_torchdynamo_compiling())
        h, c = self._initial(vectors) if state is None else self._checked(state, vectors)
        first = first_positions(words) if wanted else None
        layers, hidden_states, ended = [torch.cat([vectors, vectors], -1)], [], []
        for index, layer in enumerate(self.layers):
            if first is not None:
                hidden_states.append(at_positions(layers[-1], words.owner))
                layers[-1] = at_positions(hidden_states[-1], first)
            ahead, behind = self.dropout(layers[-1]).chunk(2, -1)
            inputs = runs.taken(ahead, runs.forwards), runs.taken(behind, runs.backwards)
            ahead, behind, *after = layer(*inputs, runs, h[index, 0], c[index, 0], h[index, 1], c[index, 1])
            both = (runs.put_back(ahead, runs.forwards_back), runs.put_back(behind, runs.backwards_back))
            layers.append(torch.cat(both, -1))
            ended.append(after)
        hidden_states.append(at_positions(layers[-1], words.owner))
        final_h = torch.stack([torch.stack([after[0], after[2]]) for after in ended])
        final_c = torch.stack([torch.stack([after[1], after[3]]) for after in ended])
        return tuple(layers), tuple(hidden_states), (final_h, final_c)

    def _shapes(self, vectors: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        layers = self.config.num_hidden_layers
        rows = vectors.shape[0]
        return (layers, 2, rows, self.config.projection_size), (layers, 2, rows, self.config.cell_size)

    def _initial(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        h, c = self._shapes(vectors)
        return vectors.new_zeros(h), vectors.new_zeros(c)

    def _checked(self, state: tuple[Tensor, Tensor], vectors: Tensor) -> tuple[Tensor, Tensor]:
        wanted, found = self._shapes(vectors), tuple(tuple(part.shape) for part in state)
        if found != wanted:
            raise ValueError(f"state must hold h and c of shapes {wanted}, for a batch of as many rows, got {found}")
        return state[0].to(vectors), state[1].to(vectors)


def at_positions(words: Tensor, index: Tensor) -> Tensor:
    """Return what words `(batch, words, width)` have at the positions `(batch, length)` that index them; zero at others."""
    padded = pad(words, (0, 0, 0, 1))
    return padded.gather(1, index[..., None].expand(-1, -1, words.shape[-1]))


def first_positions(words: Spelled) -> Tensor:
    """Return `(batch, words)` the first position of each word; the number of positions where there is no word."""
    length, count = words.owner.shape[1], words.mask.shape[1]
    columns = torch.arange(length, device=words.owner.device).expand_as(words.owner)
    first = columns.new_full((len(columns), count + 1), length)
    return first.scatter_reduce(1, words.owner, columns, "amin")[:, :count]


class MixedLayers:
    """What the heads for tasks read: the scalar mix of all layers ([1], eq. 1)."""

    mix: ScalarMix

    def make_head(self, config: ElmoConfig) -> None:
        """Make the mix, dropout and the classifier."""
        self.mix = ScalarMix(config.num_hidden_layers + 1, config.mix_layer_norm)
        super().make_head(config)  # type: ignore[misc]

    def mixed(self, outputs: Any) -> Tensor:
        """Return one vector a word, `(batch, words, hidden_size)`."""
        return self.mix(outputs.layers, outputs.word_mask.bool())


class ElmoForTokenClassification(MixedLayers, TokenClassificationHead, ElmoPreTrainedModel):
    """Tagger over the mixed layers. All positions of a word have the same logits."""

    body_class = ElmoModel

    def features(self, outputs: Any) -> Tensor:
        """Return what the classifier reads, `(batch, length, hidden_size)`."""
        return at_positions(self.mixed(outputs), outputs.word_index)


class ElmoForSequenceClassification(MixedLayers, SequenceClassificationHead, ElmoPreTrainedModel):
    """Text classifier or regressor over the mixed layers; `config.pooling` says how the words are summed up."""

    body_class = ElmoModel

    def pooled(self, outputs: Any, attention_mask: Tensor | None) -> Tensor:
        """Return what the classifier reads, `(batch, hidden_size)`: a summary of words, not of positions."""
        return summed_up(self.mixed(outputs), outputs.word_mask.bool(), self.config.pooling, "both")


class ElmoForPreTraining(Head, ElmoPreTrainedModel):
    """A language model in each direction; both share the words' vectors and the softmax ([1], section 3.1).

    Args:
        config: the model's configuration; words are hashed to `target_vocab_size` classes.
    """

    body_class = ElmoModel

    def make_head(self, config: ElmoConfig) -> None:
        """Make the softmax over classes of words."""
        self.softmax = nn.Linear(config.projection_size, config.target_vocab_size)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> ElmoForPreTrainingOutput:
        """Predict each word from those before it, and from those behind it.

        Args:
            input_ids, attention_mask, inputs_embeds: as in `ElmoModel.forward`.
            labels: `(batch, length)`, such as the input ids; -100 where nothing is predicted. A word is predicted where
                its first position has a label; which word it is follows from the input ids.
            kwargs: `num_items_in_batch`, by which the summed loss is divided, as Trainer gives it: it counts labels, so
                label only the first position of each word to have nats a word then.

        Raises:
            ValueError: labels are of another shape, or no character ids.
        """
        if labels is not None and input_ids is None:
            raise ValueError("labels are words of input_ids: with inputs_embeds they must be None")
        outputs = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        ahead, behind = outputs.layers[-1].chunk(2, -1)
        found = ElmoForPreTrainingOutput(**passthrough_outputs(outputs, ElmoForPreTrainingOutput))
        targets = None if labels is None else self._targets(input_ids, attention_mask, labels)
        if self.training and targets is not None:
            found.sums = torch.stack([self._summed(ahead, targets[0]), self._summed(behind, targets[1])])
        else:
            scores = self.softmax(ahead), self.softmax(behind)
            found.logits, found.backward_logits = scores
            if targets is not None:
                pairs = list(zip(scores, targets, strict=True))
                found.sums = torch.stack([summed_loss(*pair) for pair in pairs])
                found.correct = torch.stack([(score.argmax(-1) == wanted).sum() for score, wanted in pairs])
        if targets is not None:
            found.counts = torch.stack([(wanted != IGNORED).sum() for wanted in targets])
            found.loss = self._mean(found["sums"], found["counts"], kwargs.get("num_items_in_batch"))
        return found

    def _mean(self, sums: Tensor, counts: Tensor, items: Any) -> Tensor:
        if items is not None:
            return normalised(sums.sum() / 2, 1, items)
        return (sums / counts.clamp(min=1)).mean()

    def _summed(self, hidden: Tensor, targets: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        return chunked_loss(self.softmax, flat, targets.flatten(), self.config.loss_chunk_size, torch.float32)

    def _targets(self, input_ids: Any, attention_mask: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class `(batch, words)` of the word behind each word, and of the word before it."""
        words = self.model.spelled(input_ids, attention_mask, None)
        check_labels(labels, self.config.vocab_size, tuple(input_ids.shape[:2]))
        classes = word_classes(words.ids, int(self.config.filler_token_id or 0), self.config.target_vocab_size)
        chosen = classes.masked_fill(~(words.mask & labelled(words, labels)), IGNORED)
        behind = pad(chosen, (0, 1), value=IGNORED)[:, 1:].masked_fill(~words.mask, IGNORED)
        before = pad(chosen, (1, 0), value=IGNORED)[:, :-1].masked_fill(~words.mask, IGNORED)
        return behind, before

    def loss_items(self, inputs: Any) -> dict[str, Tensor]:
        """Words that each direction predicts, of a batch as `forward` takes it."""
        ahead, back = self._targets(inputs["input_ids"], inputs.get("attention_mask"), inputs["labels"])
        return {"forwards": (ahead != IGNORED).sum(), "backwards": (back != IGNORED).sum()}

    def loss_sums(self, outputs: Any, inputs: Any) -> dict[str, Tensor]:
        """Half the summed loss of each direction, so that the loss is their mean."""
        ahead, back = outputs["sums"] / 2
        return {"forwards": ahead, "backwards": back}


def labelled(words: Spelled, labels: Tensor) -> Tensor:
    """Return `(batch, words)` whether the first position of each word has a label."""
    return pad(labels, (0, 1), value=IGNORED).gather(1, first_positions(words)) != IGNORED


def word_classes(spellings: Any, filler: int, classes: int) -> Tensor:
    """Return the class `(batch, words)` that each spelling `(batch, words, W)` is hashed to."""
    found: Tensor = spelling_keys(spellings, filler).remainder(classes)
    return found


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed loss, nats, of logits `(batch, words, classes)`."""
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


__all__ = [
    "ElmoForPreTraining",
    "ElmoForSequenceClassification",
    "ElmoForTokenClassification",
    "ElmoModel",
    "ElmoPreTrainedModel",
]
