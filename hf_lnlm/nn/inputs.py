"""What every `forward` does first: inputs, masks, packing and caches, read once and to the same meaning in every family.

The state of a sequence is called `past_key_values` by transformers up to 5.23 and `cache` from 5.24 on. Both names are one
argument here, and a cache under a third name is refused, so that another renaming is an error and not a model that
generates without its past.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.import_utils import is_torchdynamo_compiling

from .masks import SegmentInfo, segment_info
from .state import StateCache

CACHE_FIELD = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"
"""Name of the cache among the outputs of this transformers."""

MEANINGLESS = {
    "cache_position": "a state knows how many positions it has seen",
    "num_items_in_batch": "divides a head's loss and nothing else",
    "output_attentions": "read where outputs are recorded",
    "output_hidden_states": "read where outputs are recorded",
    "return_dict": "read where outputs are returned",
    "use_cache": "read by models that have a state; the others return none",
    "cu_seq_lens_k": "a model without cross-attention has the same documents as `cu_seq_lens_q`",
    "max_length_q": "follows from `cu_seq_lens_q`",
    "max_length_k": "follows from `cu_seq_lens_k`",
}
"""Keywords that change no number, each with the reason. `token_type_ids` that are all zero join them."""


def take_cache(past_key_values: Cache | None, keywords: dict[str, Any]) -> Any:
    """Return the state so far, by whichever of its two names it was given, and take it out of `keywords`.

    Args:
        past_key_values: the argument of that name.
        keywords: the other arguments of `forward`; `cache` is removed.

    Raises:
        TypeError: two different ones are given.
    """
    cache = keywords.pop("cache", None)
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise TypeError("past_key_values and cache are one argument: give one of them, got two different caches")
    return past_key_values if cache is None else cache


def check_keywords(keywords: Mapping[str, Any], read: Iterable[str] = ()) -> None:
    """Refuse tensors and caches that nothing would read.

    Args:
        keywords: the arguments that `forward` does not name.
        read: those of them that the model reads itself.

    Raises:
        TypeError: naming the keyword, and what it holds.
    """
    for name, value in keywords.items():
        if value is None or name in MEANINGLESS or name in read or not _carries_data(value):
            continue
        if name == "token_type_ids" and isinstance(value, torch.Tensor):
            if is_torchdynamo_compiling() or value.device.type != "cpu" or not bool(value.any()):
                continue
            raise TypeError("token_type_ids must be all zero: this model has no segment types, got others")
        raise TypeError(f"forward() got an unexpected keyword argument {name!r} (a {type(value).__name__})")


def _carries_data(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_carries_data(item) for item in value)
    return isinstance(value, (torch.Tensor, Cache)) or hasattr(value, "__array__")


def as_masked(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments for empty texts, ids and mask `(batch, 0)`, with one position, which is masked.

    A row of them is one without any real token then, as in a batch with other texts.

    Args:
        given: the keyword arguments of a call.

    Returns:
        None where there is a position, no mask, or a cache, to which an empty input would add one.
    """
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] or not len(ids):
        return None
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        return None
    if given.get("past_key_values") is not None or given.get("cache") is not None or is_torchdynamo_compiling():
        return None
    same = {
        name: value for name, value in given.items() if isinstance(value, torch.Tensor) and value.shape == ids.shape
    }
    return {**given, **{name: value.new_zeros(len(ids), 1) for name, value in same.items()}, "use_cache": False}


def without_positions(outputs: Any) -> Any:
    """Return the outputs of a call, `(batch, positions, width)` of them with no positions: those of empty texts.

    Args:
        outputs: a tensor, or a mapping, list or tuple of outputs.
    """
    if isinstance(outputs, torch.Tensor):
        return outputs[:, :0] if outputs.dim() == 3 else outputs
    if isinstance(outputs, dict):
        for name, value in outputs.items():
            outputs[name] = without_positions(value)
        return outputs
    return type(outputs)(map(without_positions, outputs)) if isinstance(outputs, (list, tuple)) else outputs


def opened(input_ids: torch.Tensor, attention_mask: torch.Tensor, token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask in which a row without any real token ends with the token that opens a text.

    Args:
        input_ids, attention_mask: `(batch, length)`; left as they are if their shapes differ.
        token: the opening token's id.
    """
    if input_ids.shape != attention_mask.shape:
        return input_ids, attention_mask
    if not input_ids.shape[1]:
        input_ids, attention_mask = input_ids.new_zeros(len(input_ids), 1), attention_mask.new_zeros(len(input_ids), 1)
    last = torch.zeros_like(attention_mask, dtype=torch.bool)
    last[:, -1] = ~attention_mask.bool().any(1)
    return input_ids.masked_fill(last, token), attention_mask.masked_fill(last, 1)


class Batch(NamedTuple):
    """One call's inputs.

    Attributes:
        hidden: `(batch, length, width)` embeddings.
        segments: which positions are real and where documents begin.
        cache: the state so far, to be read and written; None for none.
        kind: what reads and writes the cache, such as "lstm".
        past: positions that the cache has seen.
    """

    hidden: torch.Tensor
    segments: SegmentInfo
    cache: StateCache
    kind: str
    past: int

    def read(self, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor] | None:
        """Return a layer's recurrent state, name → `(batch, *shape)`; None where the initial one applies.

        Raises:
            ValueError: the cache holds another kind of state, or other shapes.
        """
        if self.cache is None:
            return None
        state: Any = self.cache.layers[layer]
        return state.read(self.kind, self.hidden.shape[0], shapes)

    def write(self, layer: int, states: dict[str, torch.Tensor]) -> None:
        """Replace a layer's recurrent state, if there is a cache."""
        if self.cache is not None:
            state: Any = self.cache.layers[layer]
            state.write(self.kind, states, self.hidden.shape[1])


def prepare(
    model: Any,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    places: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    past_key_values: Cache | None,
    use_cache: bool | None,
    keywords: dict[str, Any],
    prefix: str = "",
) -> Batch:
    """Read the inputs of a call of `forward`.

    Args:
        model: an `LNLMPreTrainedModel`, whose `embed` takes ids to embeddings.
        input_ids: `(batch, length)`; or give `inputs_embeds` `(batch, length, config.input_width)`.
        inputs_embeds: see `input_ids`.
        places: attention mask, `(batch, length)` or `(batch, past + length)`; position ids and document numbers
            `(batch, length)`; each may be None.
        past_key_values: the state so far.
        use_cache: whether a state is to be kept.
        keywords: the other arguments; `cu_seq_lens_q` is read, `cache` is another name of `past_key_values`.
        prefix: of the arguments' names in messages, such as "decoder_".

    Raises:
        ValueError: inputs do not fit each other or the model.
        TypeError: an argument would be ignored.
    """
    cache = take_cache(past_key_values, keywords)
    check_keywords(keywords, ("cu_seq_lens_q",))
    hidden = embedded(model, input_ids, inputs_embeds, prefix)
    cache = own_cache(model, cache, use_cache, hidden.shape[0])
    past = 0 if cache is None else int(cache.get_seq_length())  # a static layer counts in a tensor
    segments = segment_info(hidden, *places, keywords.get("cu_seq_lens_q"), past)
    return Batch(hidden, segments, cache, model.state_kind, past)


def embedded(
    model: Any, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, prefix: str = ""
) -> torch.Tensor:
    """Return the embeddings `(batch, length, width)` of whichever input is given.

    Args:
        model: an `LNLMPreTrainedModel`, whose `embed` takes ids to embeddings.
        input_ids: `(batch, length)`.
        inputs_embeds: `(batch, length, config.input_width)`.
        prefix: of the arguments' names in messages, such as "decoder_".

    Raises:
        ValueError: both or none are given, or shape, type or range are not what the model reads.
    """
    if inputs_embeds is not None:
        check_given(input_ids, inputs_embeds, model.config.input_width, model.dtype, prefix)
        return inputs_embeds
    check_given(input_ids, None, prefix=prefix)
    try:
        return model.embed(input_ids)
    except IndexError:  # on a CPU, and at no cost
        check_ids(input_ids, model.num_token_ids, prefix)
        raise


def check_given(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    width: int | None = None,
    dtype: torch.dtype | None = None,
    prefix: str = "",
) -> None:
    """Refuse inputs that are no batch of token ids or embeddings.

    Args:
        input_ids: `(batch, length)`.
        inputs_embeds: `(batch, length, width)`.
        width, dtype: that embeddings must have.
        prefix: of the arguments' names in messages.

    Raises:
        ValueError: both or none are given, or shape or type are not what a model reads.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = ("neither", "both")[input_ids is not None]
        raise ValueError(f"give exactly one of {prefix}input_ids and {prefix}inputs_embeds, got {given}")
    if input_ids is not None:
        _check_shape(f"{prefix}input_ids", input_ids, 2, "(batch, length)")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{prefix}input_ids must be whole numbers (int64 or int32), got {input_ids.dtype}")
    if inputs_embeds is not None:
        _check_shape(f"{prefix}inputs_embeds", inputs_embeds, 3, f"(batch, length, {width})", width)
        if not inputs_embeds.is_floating_point():
            raise ValueError(f"{prefix}inputs_embeds must be floating-point numbers, got {inputs_embeds.dtype}")
        if inputs_embeds.dtype != dtype and not torch.is_autocast_enabled(inputs_embeds.device.type):
            raise ValueError(
                f"{prefix}inputs_embeds must be {dtype}, as the model's weights are, got {inputs_embeds.dtype}"
            )


def check_ids(input_ids: torch.Tensor | None, size: int, prefix: str = "") -> None:
    """Refuse token ids that have no embedding, on a CPU; elsewhere that would wait for the device.

    Args:
        input_ids: `(batch, length)`, or None.
        size: of the vocabulary.
        prefix: of the argument's name in messages.

    Raises:
        ValueError: naming the first wrong id.
    """
    if input_ids is None or input_ids.device.type != "cpu" or is_torchdynamo_compiling():
        return
    wrong = input_ids[(input_ids < 0) | (input_ids >= size)]
    if wrong.numel():
        raise ValueError(f"{prefix}input_ids must be between 0 and vocab_size - 1 ({size - 1}), got {int(wrong[0])}")


def _check_shape(name: str, inputs: Any, dims: int, wanted: str, width: int | None = None) -> None:
    """Refuse inputs of another shape than is wanted, or without rows or positions."""
    shape = tuple(getattr(inputs, "shape", ()))
    if len(shape) != dims or (width is not None and shape[-1] != width):
        raise ValueError(f"{name} must have shape {wanted}, got {shape}")
    if 0 in shape[:2]:
        raise ValueError(f"the input has no {'rows' if shape[0] == 0 else 'positions'}: {name} has shape {shape}")


def own_cache(model: Any, cache: Cache | None, use_cache: bool | None, rows: int) -> StateCache:
    """Return the cache to use: the one given if it is the model's, else a new one if wanted.

    Args:
        model: an `LNLMPreTrainedModel`.
        cache: what was given.
        use_cache: whether a state is to be kept.
        rows: of the input.

    Raises:
        ValueError: the cache is of another family, depth or batch, the model reads whole sequences, or gradient
            checkpointing would run attention layers with a cache twice.
    """
    if model.reads_both_ways:
        if cache is not None:
            raise ValueError("a model that reads both ways reads whole sequences: past_key_values must be None")
        return None
    if cache is None and not use_cache:
        return None
    cache = DynamicCache(config=model.config) if cache is None else cache
    layers = getattr(cache, "layers", [])
    if len(layers) != len(model.layer_types) or not all(map(_fits, layers, model.layer_types)):
        raise ValueError(
            f"past_key_values must hold the states of {len(model.layer_types)} layers, as "
            f"DynamicCache(config=model.config) makes them, got {cache!r}"
        )
    for layer in layers:
        if hasattr(layer, "check_kind"):
            layer.check_kind(model.state_kind)
            found = layer.batch_size
            if found not in (None, rows):
                raise ValueError(f"past_key_values holds the state of {found} rows, the input has {rows}")
            layer.kind = model.state_kind
    if _recomputed(model) and not all(getattr(layer, "survives_recomputing", False) for layer in layers):
        raise ValueError(
            "gradient checkpointing runs a layer twice, which cannot extend keys and values: past_key_values must be None"
        )
    return cache


def _recomputed(model: Any) -> bool:
    """Tell whether transformers runs the layers again for their gradients; up to 5.23 it does so without gradients too."""
    asked = model.training and getattr(model, "gradient_checkpointing", False)
    return asked and (torch.is_grad_enabled() or CACHE_FIELD == "past_key_values")


def _fits(layer: Any, layer_type: str) -> bool:
    """Tell whether a cache layer is what a model's layer wants; those of transformers have no type of ours."""
    own = getattr(layer, "lnlm_layer_type", None)
    return own == layer_type if layer_type.startswith("lnlm_") else own is None
