"""Neural computers of other projects, to ours.

`from_deepmind_dnc`: the variables of google-deepmind/dnc (Sonnet 1), whose orders differ from ours in three places:

| | there | here |
|---|---|---|
| LSTM gates | input, candidate, forget (plus 1), output; on x, r, h | input, forget, candidate, output; x apart, on h, r |
| interface | one linear layer a part | one layer, parts in the order of the paper (`ops/memory/dnc/layout.py`) |
| read modes | backward, forward, content | backward, content, forward |

Two things can't be carried over by weights: there a lookup's strength is softplus(x), here the paper's 1 + softplus(x);
and there the controller's state is clipped where here the interface is (`interface_clip`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..models.memory.configuration_dnc import DNCConfig
from ..models.memory.modeling_dnc import DNCForSequenceTransduction
from .weights import StateDict, filled

_CELL = "model.layers.0.forwards."
_PARTS = (
    "read_keys", "read_strengths", "write_keys", "write_strengths", "erase_vectors", "write_vectors", "free_gate",
    "allocation_gate", "write_gate",
)  # fmt: skip


def from_deepmind_dnc(variables: StateDict, config: Any) -> StateDict:
    """Return a state dict for `DNCForSequenceTransduction`.

    Args:
        variables: name → tensor as TensorFlow has them, `(inputs, outputs)`: `.../lstm/w_gates`, `.../lstm/b_gates`,
            `.../read_keys/w`, `.../read_keys/b` and so on, `.../output_linear/w`; `:0` at the end does not matter.
        config: a `DNCConfig` of one layer, with `residual=False`, temporal links and an LSTM controller.

    Raises:
        ValueError: the config is of another kind, or a variable is missing or of another shape.
    """
    _check_config(config)
    found = _Variables(variables)
    size, inputs = int(config.controller_size), int(config.input_size)
    reads, writes, width = config.num_read_heads, config.num_write_heads, config.memory_width
    gates = found.get("lstm/w_gates", inputs + reads * width + size, 4 * size).T
    bias = found.get("lstm/b_gates", 4 * size)
    from_inputs, from_reads, from_hidden = _gates(gates).split([inputs, reads * width, size], 1)
    gate_bias = _gates(bias)
    gate_bias[size : 2 * size] += 1.0
    lengths = (reads * width, reads, writes * width, writes, writes * width, writes * width, reads, writes, writes)
    rows = [found.linear(name, size, length) for name, length in zip(_PARTS, lengths, strict=True)]
    modes = found.linear("read_mode", size, reads * (1 + 2 * writes))
    rows.append((_modes(modes[0], reads, writes), _modes(modes[1], reads, writes)))
    output = found.linear("output_linear", size + reads * width, int(config.output_size))
    tensors = {
        "input_proj.weight": from_inputs,
        "input_proj.bias": gate_bias,
        "recurrent_proj.weight": torch.cat([from_hidden, from_reads], 1),
        "interface_proj.weight": torch.cat([weight for weight, _ in rows]),
        "interface_proj.bias": torch.cat([bias for _, bias in rows]),
        "output_proj.weight": output[0],
        "output_proj.bias": output[1],
    }
    return {_CELL + name: tensor.contiguous() for name, tensor in tensors.items()}


def deepmind_dnc(variables: StateDict, fields: Mapping[str, Any]) -> DNCForSequenceTransduction:
    """The neural computer whose variables these are, its sizes told from their shapes.

    Args:
        variables: see `from_deepmind_dnc`.
        fields: of `DNCConfig`; `memory_size` must be among them, since no weight tells how many slots there are.

    Raises:
        ValueError: it is not, or the variables don't fit each other.
    """
    if "memory_size" not in fields:
        raise ValueError(
            "no weight tells how many slots the memory has: say memory_size=N (its training script's is 16)"
        )
    found = _Variables(variables)
    size, keys = found.one("read_keys/w").shape
    reads, writes = (found.one(f"{name}_strengths/w").shape[1] for name in ("read", "write"))
    outputs = found.one("output_linear/w").shape[1]
    sizes = {
        "input_size": found.one("lstm/w_gates").shape[0] - keys - size,
        "output_size": outputs,
        "hidden_size": outputs,
        "controller_size": size,
        "memory_width": keys // reads,
        "num_read_heads": reads,
        "num_write_heads": writes,
        "residual": False,
    }
    config = DNCConfig(**{**sizes, **fields})
    state = from_deepmind_dnc(variables, config)
    dtype = next(iter(state.values())).dtype
    return filled(DNCForSequenceTransduction(config), state, dtype, fresh=["memory"]).eval()


class _Variables:
    """Variables by the end of their names."""

    def __init__(self, variables: StateDict) -> None:
        self.variables = {name.removesuffix(":0"): tensor for name, tensor in variables.items()}

    def one(self, ending: str) -> torch.Tensor:
        """The one variable whose name ends so."""
        return self.variables[self._name(ending)]

    def _name(self, ending: str) -> str:
        names = [name for name in self.variables if name == ending or name.endswith("/" + ending)]
        if len(names) != 1:
            raise ValueError(f"variables must hold exactly one {ending}, got {names or 'none'}")
        return names[0]

    def get(self, ending: str, *shape: int) -> torch.Tensor:
        """The one variable whose name ends so, as a copy of that shape."""
        tensor = self.one(ending)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{self._name(ending)} must have shape {shape} for this config, got {tuple(tensor.shape)}")
        return tensor.clone()

    def linear(self, name: str, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight `(outputs, inputs)` and bias of a linear layer."""
        return self.get(f"{name}/w", inputs, outputs).T, self.get(f"{name}/b", outputs)


def _gates(tensor: torch.Tensor) -> torch.Tensor:
    """Rows from input, candidate, forget, output to input, forget, candidate, output."""
    gate_in, candidate, forget, gate_out = tensor.chunk(4)
    return torch.cat([gate_in, forget, candidate, gate_out])


def _modes(tensor: torch.Tensor, reads: int, writes: int) -> torch.Tensor:
    """Rows of each head from backward, forward, content to backward, content, forward."""
    heads = tensor.unflatten(0, (reads, 1 + 2 * writes))
    backward, forward, content = heads.split([writes, writes, 1], 1)
    return torch.cat([backward, content, forward], 1).flatten(0, 1)


def _check_config(config: Any) -> None:
    wanted = {
        "model_type": "lnlm_dnc", "num_hidden_layers": 1, "residual": False, "controller_type": "lstm",
        "use_temporal_links": True, "use_masking": False, "use_sharpness": False, "use_deallocation": False,
        "layer_norm": False, "bidirectional": False,
    }  # fmt: skip
    for name, value in wanted.items():
        if (getattr(config, name) or False) != value:  # None is one direction
            raise ValueError(f"{name} must be {value!r} for these weights, got {getattr(config, name)!r}")
    if config.input_size is None:
        raise ValueError("input_size must be the width of the inputs, got None")
