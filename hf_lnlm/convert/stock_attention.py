"""The sparse patterns for stock models, through transformers' attention interface.

`enable_sparse_attention(model, ...)` switches a GPT-2, Llama, BERT, RoBERTa, ELECTRA or ALBERT to
`attn_implementation="lnlm_sparse"`. Weights stay as they are. Importing hf_lnlm registers the implementation, so the
choice survives saving and loading; a process without hf_lnlm refuses to load such a checkpoint.

How it survives: transformers saves every attribute of a config, but not the attention implementation, which it reads
from a key `attn_implementation` all the same. So a config with `sparse_attention` options carries that key as an
attribute; a descriptor on transformers' config class puts it back whenever the options are set, loading included. A
second one keeps it where the implementation is merely unset: by `from_pretrained(..., attn_implementation=None)`, or by a
config of several models, which unsets that of its parts.

What would be silently wrong is refused: models that take the name and stay dense, by whatever way they get it, masks and
arguments that the function can't honour.

Complexity: see `ops/sparse_attention`; one token with a cache costs the keys it sees.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, flash_attention_mask
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import _active_collector

from ..ops.sparse_attention.attention import sparse_attention
from ..ops.sparse_attention.pattern import SparsePattern, logical_positions, patterns_for_layer
from ..ops.sparse_attention.reference import sparse_attention_reference
from ..ops.sparse_attention.step import attend_cached_heads, repeat_heads

IMPLEMENTATION = "lnlm_sparse"
_OPTIONS, _SAVED, _IN_USE = "sparse_attention", "attn_implementation", "_attn_implementation_internal"

SUPPORTED = ("gpt2", "llama", "bert", "roberta", "electra", "albert")
"""Model types whose attention goes through transformers' interface whole, tested one by one."""

REFUSED = {
    "xlnet": "it takes any name and never calls the attention interface",
    "gpt_neo": "its attention is not on the interface; hf_lnlm's GPT3 imports its weights",
    "longformer": "it has an attention of its own and takes any name",
    "t5": "its position bias has no counterpart in a sparse pattern",
    "switch_transformers": "its position bias has no counterpart in a sparse pattern",
}
"""Model types that would be silently dense or wrong, and why."""

# Arguments of stock attention modules that carry nothing an attention function must honour.
_HARMLESS = ("position_ids", "cache_position", "position_embeddings", "token_type_ids", "num_items_in_batch", "labels")


def enable_sparse_attention(
    model: PreTrainedModel,
    pattern: str = "fixed",
    combination: str = "merged",
    stride: int = 128,
    summary_size: int = 16,
) -> PreTrainedModel:
    """Switch a stock model to sparse attention, for good: it survives saving and loading by Auto classes.

    Args:
        model: a GPT-2, Llama, BERT, RoBERTa, ELECTRA or ALBERT model with any head.
        pattern: `strided`, `fixed`, `local` or `full`.
        combination: `merged`, `interleaved` (layer after layer) or `per_head`.
        stride: l, in tokens; shorter inputs are attended to densely, since the pattern then allows everything.
        summary_size: c, columns of a block that everything later sees, of the fixed pattern; at most `stride`.

    Returns:
        The same model.

    Raises:
        ValueError: the model would silently ignore the choice, or an option is out of range.
    """
    config = model.config
    _check_model(config, combination)
    options = {"pattern": pattern, "combination": combination, "stride": stride, "summary_size": summary_size}
    _check_options(options, config.num_attention_heads)
    config.sparse_attention = options
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def _check_options(options: dict[str, Any], heads: int) -> None:
    for name in ("stride", "summary_size"):
        if type(options[name]) is not int or options[name] < 1:
            raise ValueError(f"{name} must be a whole number of tokens, at least 1, got {options[name]!r}")
    if options["pattern"] == "fixed" and options["summary_size"] > options["stride"]:
        raise ValueError(f"summary_size must be at most stride ({options['stride']}), got {options['summary_size']}")
    groups = len(_patterns(options, 0, True))
    if heads % groups:
        raise ValueError(f"num_attention_heads must divide evenly over {groups} patterns, got {heads}")


def _check_type(config: Any) -> None:
    kind = config.model_type
    if kind not in SUPPORTED:
        reason = REFUSED.get(kind, "it has not been tested and might stay dense")
        raise ValueError(f"{kind} cannot use sparse attention: {reason}. Supported: {', '.join(SUPPORTED)}")


def _check_model(config: Any, combination: str) -> None:
    _check_type(config)
    if config.model_type == "albert" and combination == "interleaved":
        raise ValueError(
            "albert runs one layer again and again, which cannot interleave patterns: use merged or per_head"
        )
    for option in ("reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(config, option, False):
            raise ValueError(f"sparse attention cannot honour {option}: it must be False, got True")
    if getattr(config, "output_attentions", False):
        raise ValueError("output_attentions must be False in the config, got True: ask for weights in a forward call")


def disable_sparse_attention(model: PreTrainedModel, implementation: str = "sdpa") -> PreTrainedModel:
    """Undo `enable_sparse_attention`, for good.

    Args:
        model: a model that it was applied to.
        implementation: the attention implementation to go back to.

    Returns:
        The same model.
    """
    for name in (_OPTIONS, _SAVED):
        model.config.__dict__.pop(name, None)
    model.set_attn_implementation(implementation)
    return model


class _Stored:
    """An attribute of a config that lies in its `__dict__` as any other, but whose setting subclasses watch.

    Args:
        name: of the attribute.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, config: Any, owner: Any = None) -> Any:
        if config is None:
            return self
        if self.name not in config.__dict__:
            raise AttributeError(f"{type(config).__name__!r} object has no attribute {self.name!r}")
        return config.__dict__[self.name]


class _SparseOptions(_Stored):
    """The attribute `sparse_attention` of a config: setting it also sets what makes it survive saving."""

    def __set__(self, config: Any, options: Any) -> None:
        config.__dict__[_OPTIONS] = options
        if _are_options(options):  # other people's configs may have an attribute of this name
            _check_type(config)
            config.__dict__[_SAVED] = IMPLEMENTATION
            if config.__dict__.get(_IN_USE) is None:
                config.__dict__[_IN_USE] = IMPLEMENTATION


class _ImplementationInUse(_Stored):
    """Where a config keeps the attention implementation: unsetting it does not undo `enable_sparse_attention`, and a
    model that would take the name and stay dense is refused."""

    def __set__(self, config: Any, name: Any) -> None:
        if name == IMPLEMENTATION and not config.sub_configs:  # a config of several models hands it on to its parts
            _check_type(config)
        if name is None and _are_options(config.__dict__.get(_OPTIONS)):
            name = IMPLEMENTATION
        config.__dict__[_IN_USE] = name


def _are_options(options: Any) -> bool:
    return isinstance(options, dict) and {"pattern", "combination", "stride", "summary_size"} <= options.keys()


def _patterns(options: dict[str, Any], layer: int, causal: bool) -> tuple[SparsePattern, ...]:
    stride = options["stride"]
    summary = min(options["summary_size"], stride)
    return patterns_for_layer(
        options["pattern"], options["combination"], layer, stride=stride, summary=summary, causal=causal
    )  # fmt: skip


def sparse_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Give stock models the 2-D mask `(batch, keys)`, or None without padding, and refuse masks of other shapes.

    Args:
        batch_size: rows.
        q_length: queries of this step.
        kv_length: keys, cached ones included.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: what the model asks for; causal or bidirectional.
        attention_mask: `(batch, keys)`.

    Raises:
        ValueError: packed rows, overlays and caches of a fixed length have no sparse counterpart here.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError("lnlm_sparse handles plain causal and bidirectional masks, got packed rows or an overlay")
    if mask_function is causal_mask_function and int(q_offset) + q_length != int(kv_offset) + kv_length:
        raise ValueError(
            f"lnlm_sparse needs a cache that grows, got {kv_length} keys for {int(q_offset) + q_length} tokens"
        )
    return flash_attention_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs
    )  # fmt: skip


def sparse_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend for a stock attention module.

    Args:
        module: the stock module; its config holds `sparse_attention`.
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, key_heads, keys, head_dim)`, cached ones included.
        value: as `key`.
        attention_mask: bool `(batch, keys)`, or None without padding.
        dropout: probability of dropping an attention weight.
        scaling: factor of the scores.
        is_causal: replaces the module's own.

    Returns:
        `(batch, queries, heads, head_dim)`, and the weights if `output_attentions` is among the arguments.

    Raises:
        ValueError: an argument or mask that cannot be honoured, or a model that `enable_sparse_attention` has not
            set up.
    """
    options: Any = getattr(getattr(module, "config", None), "sparse_attention", None)
    if not _are_options(options):
        raise ValueError("attn_implementation='lnlm_sparse' needs hf_lnlm.enable_sparse_attention(model, ...) first")
    _check_arguments(query, key, attention_mask, kwargs)
    _check_unpacked(kwargs.get("position_ids"), attention_mask)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    patterns = _patterns(options, getattr(module, "layer_idx", None) or 0, causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kwargs.get("output_attentions") or _weights_recorded():
        out, weights = _with_weights(query, key, value, patterns, attention_mask, scale, dropout)
        return out.transpose(1, 2).contiguous(), weights
    if query.shape[2] == key.shape[2]:
        out = sparse_attention(query, key, value, patterns, mask=attention_mask, scale=scale, dropout=dropout)
    else:
        at = _positions(query, key, attention_mask)
        out = attend_cached_heads(query, key, value, patterns, *at, scale, dropout)
    return out.transpose(1, 2).contiguous(), None


def _weights_recorded() -> bool:
    """Whether transformers records attention weights now: some models don't pass `output_attentions` on."""
    return "attentions" in (_active_collector.get() or {})


def _check_arguments(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    unknown = [n for n, v in kwargs.items() if isinstance(v, torch.Tensor) and n not in _HARMLESS]
    if unknown:
        raise ValueError(f"lnlm_sparse cannot honour the arguments {', '.join(unknown)}")
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != key.shape[2]):
        expected = (key.shape[0], key.shape[2])
        raise ValueError(f"lnlm_sparse needs a 2-D attention_mask {expected}, got shape {tuple(mask.shape)}")
    if query.shape[2] > key.shape[2]:
        raise ValueError(
            f"lnlm_sparse is self-attention: keys must cover queries, got {key.shape[2]} < {query.shape[2]}"
        )


def _check_unpacked(position_ids: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    """Refuse positions that begin anew inside a row: with a cache or a mask transformers doesn't look for them.

    Args:
        position_ids: `(batch or 1, queries)` of this step, as decoders pass them on; None from encoders.
        mask: bool `(batch, keys)`; positions of padding may be anything.
    """
    if position_ids is None or position_ids.shape[-1] < 2 or is_torchdynamo_compiling():
        return
    real = None if mask is None else mask[:, mask.shape[1] - position_ids.shape[1] :].bool()
    placed = position_ids if real is None else position_ids.expand(real.shape).masked_fill(~real, -1)
    risen = placed[:, 1:] > placed.cummax(1).values[:, :-1]
    if not bool((risen if real is None else risen | ~real[:, 1:]).all()):
        raise ValueError("lnlm_sparse reads one text a row: position_ids must rise within a row, got packed rows")


def _positions(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logical positions of the last queries and of all keys."""
    if mask is None:
        positions = torch.arange(key.shape[2], device=key.device).expand(key.shape[0], -1)
    else:
        positions = logical_positions(mask.bool())
    return positions[:, key.shape[2] - query.shape[2] :], positions


def _with_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    patterns: tuple[SparsePattern, ...],
    mask: torch.Tensor | None,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    at = _positions(query, key, mask)
    groups = zip(*(x.chunk(len(patterns), dim=1) for x in (query, key, value)), patterns, strict=True)
    found = [sparse_attention_reference(q, k, v, pattern, *at, scale, dropout) for q, k, v, pattern in groups]
    return torch.cat([out for out, _ in found], dim=1), torch.cat([weights for _, weights in found], dim=1)


def register_attention() -> None:
    """Register `lnlm_sparse` with transformers' attention and mask interfaces. Safe to call twice.

    What is added to a transformers class are two descriptors of its configs, `sparse_attention` and the one behind
    `_attn_implementation`; configs without sparse options behave as before.
    """
    if _OPTIONS not in vars(PreTrainedConfig):
        setattr(PreTrainedConfig, _OPTIONS, _SparseOptions(_OPTIONS))
        setattr(PreTrainedConfig, _IN_USE, _ImplementationInUse(_IN_USE))
    AttentionInterface.register(IMPLEMENTATION, sparse_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sparse_mask)
