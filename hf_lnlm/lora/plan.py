"""LoRA for every family: which weights of a model low-rank adapters reach, which they don't and why, as a peft config.

The plan is read off the model itself: linear layers, `Conv1D` and ungrouped convolutions become target modules; raw
matrices become target parameters where peft can reach them; the head of a task is trained in full. What is left out is
listed with its reason, so that nothing is missed silently. A family's registry row names what the modules don't tell.
Bases quantised to 4 or 8 bits are peft's business: the plan reads them as the linear layers they are, but no test here
has the hardware for them.

References:
    [1] Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..registry import family, is_ours

logger = logging.get_logger(__name__)

TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""Ending of a class's name → peft's name of the task; other heads have none."""

LANGUAGE_HEADS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")
"""Endings of classes whose head was trained with the model: adapted like any layer, not replaced by a new one."""

STOCK_PARAMETERS = {
    "mamba": ("mixer.A_log",),
    "xlnet": tuple(
        f"rel_attn.{name}" for name in ("q", "k", "v", "o", "r", "r_r_bias", "r_s_bias", "r_w_bias", "seg_embed")
    ),
}
"""Stock model type → raw matrices of blocks that do all their reading inside `forward`, where peft can reach them."""

_READ_AROUND = dict.fromkeys(("mamba", "falcon_mamba", "jamba"), ("x_proj", "dt_proj"))
"""Stock model type → layers whose weight a fused kernel or the model itself multiplies without calling the layer."""

_REFUSED_BY_PEFT = {
    "mamba": ("out_proj", "conv1d"),
    "mamba2": ("out_proj", "conv1d"),
    "falcon_mamba": ("out_proj", "conv1d"),
    "falcon_h1": ("out_proj", "conv1d"),
    "nemotron_h": ("out_proj", "conv1d"),
}


_TIED = "tied to another weight: an adapter on one of them would untie them"
_IN_TWO_PLACES = "its layer stands in two places: peft would put an adapter into the first only, and merge it into both"


@dataclass(frozen=True)
class LoraPlan:
    """Which weights adapters reach.

    Attributes:
        modules: names of target modules, as short as they are unambiguous.
        parameters: names of raw target parameters.
        ranks: target module → its rank, where the rank asked for would exceed the matrix.
        trained: modules that are trained in full: a task's head, and what the family's row names.
        left_out: name of a weight matrix → why no adapter reaches it.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    ranks: dict[str, int]
    trained: tuple[str, ...]
    left_out: dict[str, str]


@dataclass
class _Findings:
    modules: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def lora_plan(model: nn.Module, r: int = 8, embeddings: bool = False) -> LoraPlan:
    """Look through a model for weight matrices and say what becomes of each.

    Args:
        model: a transformers model, ours or stock, not wrapped by peft.
        r: rank asked for; a module gets at most the smaller of its sizes. Raw parameters get it as it is: peft has no
            way to say otherwise without a warning.
        embeddings: also adapt tables of embeddings and an output layer over the vocabulary, where the two are not tied.

    >>> from hf_lnlm import RNNConfig, RNNForCausalLM
    >>> plan = lora_plan(RNNForCausalLM(RNNConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1)))
    >>> plan.modules
    ('input_gates', 'recurrent_gates')
    """
    trained = _trained_in_full(model)
    found = _Findings()
    shared = _shared_weights(model)
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if _below(name, trained) or (inside and name.startswith(inside)):
            continue
        if isinstance(module, nn.MultiheadAttention):  # peft wraps it as a whole: its children's forward never runs
            inside = (*inside, f"{name}.")
            found.modules[name] = min(r, module.embed_dim)
            continue
        for key, weight in module.named_parameters(recurse=False):
            if weight.dim() >= 2:
                _place(model, name, module, key, weight, r, embeddings, shared, found)
    others = [name for name, _ in model.named_modules() if name not in found.modules]
    own = [name for name, _ in model.named_parameters() if name not in found.parameters]
    modules, parameters = _shortest(found.modules, others), _shortest(found.parameters, own)
    ranks = {short: rank for short, rank in modules.items() if rank < r}
    return LoraPlan(tuple(modules), tuple(parameters), ranks, trained, found.left_out)


def _place(
    model: nn.Module,
    name: str,
    module: nn.Module,
    key: str,
    weight: nn.Parameter,
    r: int,
    embeddings: bool,
    shared: dict[int, str],
    found: _Findings,
) -> None:
    """Write into `found` what becomes of one weight matrix."""
    full = f"{name}.{key}" if name else key
    why = _obstacle(model, name, module, key, weight, embeddings, shared)
    if why is not None:
        found.left_out[full] = why
    elif key == "weight" and isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
        found.modules[name] = min(r, *weight.shape)
    elif key == "weight" and isinstance(module, nn.Conv1d) and module.groups == 1:
        found.modules[name] = min(r, module.in_channels, module.out_channels)
    else:
        found.parameters[full] = r


def _obstacle(
    model: nn.Module,
    name: str,
    module: nn.Module,
    key: str,
    weight: nn.Parameter,
    embeddings: bool,
    shared: dict[int, str],
) -> str | None:
    """Why no adapter reaches a weight, or None."""
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    if id(weight) in shared:
        return shared[id(weight)]
    if not weight.requires_grad:
        return "frozen"
    if isinstance(module, nn.Embedding) or _over_vocabulary(model, module):
        return None if embeddings else "a table over the vocabulary or positions: ask for it with embeddings=True"
    if name.rpartition(".")[2] in _REFUSED_BY_PEFT.get(model_type, ()):
        return f"peft refuses it for {model_type}, whose fused kernels read the weight around the adapter"
    if name.rpartition(".")[2] in _READ_AROUND.get(model_type, ()):
        return f"{model_type} reads the weight without calling the layer: an adapter on it would do nothing"
    if key == "weight" and isinstance(module, (nn.Linear, Conv1D, nn.Conv1d)):
        return None
    if weight.dim() > 3:
        return f"peft adapts raw weights of 2 or 3 dimensions, this one has {weight.dim()}"
    if _reads_inside_forward(model_type, name, module, key):
        return None
    return "a parameter of a block with layers of its own: peft would have to wrap the whole block"


def _over_vocabulary(model: nn.Module, module: nn.Module) -> bool:
    """Whether a layer is the output layer over the vocabulary: peft saves it whole, as it does embeddings."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return module is output


def _reads_inside_forward(model_type: str, name: str, module: nn.Module, key: str) -> bool:
    """Whether peft, which puts the adapted weight in place while `forward` runs and only then, reaches a raw weight."""
    if isinstance(module, PreTrainedModel):
        return False
    known = family(model_type).lora_parameters if is_ours(model_type) else STOCK_PARAMETERS.get(model_type, ())
    listed = any(f".{name}.{key}".endswith(f".{target}") for target in known)
    return listed or not any(True for _ in module.children())


def _shared_weights(model: nn.Module) -> dict[int, str]:
    """Ids of parameters that two modules hold, or one module that stands in two places → why no adapter is put there."""
    holders: Counter[int] = Counter()
    places: Counter[int] = Counter()
    for module in model.modules():
        holders.update(id(weight) for weight in vars(module)["_parameters"].values() if weight is not None)
        places.update(id(child) for child in vars(module)["_modules"].values() if child is not None)
    doubled = [module for module in model.modules() if places[id(module)] > 1]
    found = {id(weight): _IN_TWO_PLACES for module in doubled for weight in module.parameters(recurse=False)}
    return found | {number: _TIED for number, count in holders.items() if count > 1}


def _below(name: str, tops: Iterable[str]) -> bool:
    return any(f".{name}.".find(f".{top}.") >= 0 for top in tops)


def _trained_in_full(model: nn.Module) -> tuple[str, ...]:
    """Names of modules that are trained in full: a task's head, and what the family's row names."""
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    named = family(model_type).lora_trained if is_ours(model_type) else ()
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return (*_task_head(model), *(name for name in named if name in present))


def _task_head(model: nn.Module) -> Iterator[str]:
    """Names of a model's children that have weights and lie outside its base model, unless they were pre-trained."""
    base = getattr(model, "base_model_prefix", "")
    if not hasattr(model, base) or type(model).__name__.endswith(LANGUAGE_HEADS):
        return
    for name, child in model.named_children():
        if name != base and any(True for _ in child.parameters()):
            yield name


def _shortest(wanted: dict[str, int], others: Iterable[str]) -> dict[str, int]:
    """The shortest endings of names, with their values, that no other name has; endings begin with a word.

    Names that would have different values under one ending keep longer ones.
    """
    taken = {ending for name in others for ending in _endings(name)}
    values: dict[str, set[int]] = {}
    for name, value in wanted.items():
        for ending in _endings(name):
            values.setdefault(ending, set()).add(value)
    found: dict[str, int] = {}
    for name, value in wanted.items():
        fits = (e for e in _endings(name) if e not in taken and len(values[e]) == 1 and not e[0].isdigit())
        found[next(fits, name)] = value
    return found


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


def task_type(model: nn.Module) -> str | None:
    """Peft's name of the task that a model's class is for, or None."""
    name = type(model).__name__
    return next((kind for ending, kind in TASK_TYPES.items() if name.endswith(ending)), None)


def lora_config(
    model: nn.Module,
    r: int = 8,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    embeddings: bool = False,
    **options: Any,
) -> Any:
    """A peft `LoraConfig` that reaches all weight matrices of a model, of our families or stock.

    Linear layers (`Conv1D` and convolutions included) are target modules, raw matrices target parameters; the head of
    a task is trained in full beside them. What can't be reached is logged with its reason; `lora_plan` returns it.

    The adapter loads by `AutoPeftModelFor…` where peft has that class for the head. Other heads (a masked model's) load by
    `AutoPeftModel`, which wants `import_allowlist=[type(model).__module__]` for classes outside transformers.

    Args:
        model: a transformers model, not yet wrapped by peft.
        r: rank; a smaller matrix gets a smaller one, its scale unchanged.
        alpha: scale times rank; default 2 r.
        dropout: on the adapters' inputs; must be 0 where raw matrices are reached.
        embeddings: also adapt tables of embeddings and an output layer over the vocabulary, where the two are not
            tied; peft then saves the whole tables in the adapter's folder and says so.
        options: further fields of `LoraConfig`; they win over what was found.

    Raises:
        ValueError: a rank below 1, a model that peft has wrapped already, or dropout where raw matrices are reached.
    """
    from peft import LoraConfig, PeftModel

    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    if isinstance(model, PeftModel):
        raise ValueError(f"lora_config wants the model itself, got one that peft has wrapped: {type(model).__name__}")
    plan = lora_plan(model, r, embeddings)
    parameters = options.get("target_parameters", plan.parameters)
    if dropout and parameters:
        raise ValueError(f"dropout must be 0 where raw matrices are adapted ({', '.join(parameters)}), got {dropout}")
    for name, why in plan.left_out.items():
        logger.info(f"LoRA leaves out {name}: {why}")
    scale = (2.0 * r if alpha is None else alpha) / r
    found: dict[str, Any] = {
        "task_type": task_type(model),
        "r": r,
        "lora_alpha": scale * r,
        "lora_dropout": dropout,
        "target_modules": list(plan.modules),
        "target_parameters": list(plan.parameters) or None,
        "modules_to_save": list(plan.trained) or None,
        "rank_pattern": {_as_pattern(name): rank for name, rank in plan.ranks.items()},
        "alpha_pattern": {_as_pattern(name): scale * rank for name, rank in plan.ranks.items()},
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's linear layers
    }
    return LoraConfig(**(found | options))


def _as_pattern(name: str) -> str:
    """A name as peft's patterns want it: a regular expression."""
    return name.replace(".", r"\.")
