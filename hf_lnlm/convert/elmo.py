"""ELMo's published weights, `options.json` and an HDF5 file, to and from ours; exact, bit for bit both ways.

Both layouts are read: AllenNLP's and that of bilm-tf, which wrote it. They differ in what `options.json` says (fields of
training, `use_skip_connections` or none, no highways) and in what is left out where it does nothing: bilm-tf has no
projection of word vectors that are as wide as the LSTM's output.

What changes on the way (TensorFlow: ours): kernels are transposed; gates i, g, f, o become i, f, g, o; the input's and the
state's weights come apart; `W_carry` is the gate that lets the transformed features through. Both add 1 to the forget
gate's bias at each step (`forget_bias`), so that the biases are the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..models.recurrent.configuration_elmo import ElmoConfig
from ..models.recurrent.modeling_elmo import ElmoModel
from .weights import StateDict, filled

OPTIONS = "options.json"
_BLOCKS = (0, 2, 1, 3)
"""Where our gates i, f, g, o lie in TensorFlow's i, g, f, o, and the other way round: it is its own inverse."""


def hdf5() -> Any:
    """The package that reads HDF5.

    Raises:
        ValueError: it is not installed; says how to get it.
    """
    try:
        import h5py
    except ImportError:
        raise ValueError("ELMo's weights are an HDF5 file, which needs h5py: pip install 'hf_lnlm[elmo]'") from None
    return h5py


def files(folder: Path) -> tuple[Path, Path]:
    """The options and the weights in a folder.

    Raises:
        ValueError: there are none, or several files of weights.
    """
    options = sorted(folder.glob("*options.json")) if folder.is_dir() else []
    weights = sorted(folder.glob("*weights.hdf5")) if folder.is_dir() else []
    weights = weights or (sorted(folder.glob("*.hdf5")) if folder.is_dir() else [])
    for kind, found in ((f"*{OPTIONS}", options), ("*.hdf5", weights)):
        if len(found) != 1:
            listed = ", ".join(path.name for path in found) or "none"
            raise ValueError(f"{folder} must hold one {kind}, got {listed}")
    return options[0], weights[0]


def config_of(options: Mapping[str, Any]) -> ElmoConfig:
    """The configuration that `options.json` describes.

    Raises:
        ValueError: a field is missing or of another kind; names it.
    """
    lstm, chars = _section(options, "lstm"), _section(options, "char_cnn")
    pairs = _field(chars, "char_cnn", "filters")
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"char_cnn.filters of {OPTIONS} must be pairs of width and number, got {pairs!r}")
    if chars.get("n_characters", 262) not in (261, 262):
        raise ValueError(f"char_cnn.n_characters of {OPTIONS} must be 261 or 262, got {chars['n_characters']}")
    if options.get("bidirectional", True) is not True:
        raise ValueError(f"bidirectional of {OPTIONS} must be true, got {options['bidirectional']!r}")
    return ElmoConfig(
        embedding_size=_field(_section(chars, "embedding", "char_cnn."), "char_cnn.embedding", "dim"),
        filter_sizes=[pair[0] for pair in pairs],
        num_filters=[pair[1] for pair in pairs],
        num_highways=chars.get("n_highway") or 0,
        activation=chars.get("activation", "relu"),
        max_word_length=chars.get("max_characters_per_token", 50),
        hidden_size=2 * _field(lstm, "lstm", "projection_dim"),
        cell_size=_field(lstm, "lstm", "dim"),
        num_hidden_layers=_field(lstm, "lstm", "n_layers"),
        cell_clip=lstm.get("cell_clip"),
        projection_clip=lstm.get("proj_clip"),
        use_skip_connections=bool(lstm.get("use_skip_connections", False)),
    )


def options_of(config: ElmoConfig) -> dict[str, Any]:
    """`options.json` of a configuration."""
    lstm = {
        "cell_clip": config.cell_clip,
        "use_skip_connections": config.use_skip_connections,
        "n_layers": config.num_hidden_layers,
        "proj_clip": config.projection_clip,
        "projection_dim": config.projection_size,
        "dim": config.cell_size,
    }
    chars = {
        "embedding": {"dim": config.embedding_size},
        "filters": [list(pair) for pair in config.filters],
        "n_highway": config.num_highways,
        "n_characters": 262,
        "max_characters_per_token": config.max_word_length,
        "activation": config.activation,
    }
    return {"lstm": {k: v for k, v in lstm.items() if v is not None}, "char_cnn": chars}


def _section(options: Mapping[str, Any], name: str, prefix: str = "") -> Mapping[str, Any]:
    found = options.get(name)
    if not isinstance(found, dict):
        raise ValueError(f"{OPTIONS} must have an object {prefix}{name}, got {found!r}")
    return found


def _field(section: Mapping[str, Any], where: str, name: str) -> Any:
    if name not in section:
        raise ValueError(f"{OPTIONS} must have {where}.{name}, got {', '.join(section) or 'nothing'}")
    return section[name]


def read(folder: Path, fields: Mapping[str, Any]) -> ElmoModel:
    """The model in a folder of `options.json` and weights.

    Args:
        folder: as it was downloaded.
        fields: of `ElmoConfig` that the folder doesn't tell, such as `dropout`.

    Raises:
        ValueError: a file or field is missing, or a variable is missing, of another shape or damaged; names it.
    """
    h5py = hdf5()
    options, weights = files(folder)
    try:
        config = config_of(json.loads(options.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"{options} is no JSON: {error}") from None
    config = ElmoConfig(**{**_plain(config), **fields})
    try:
        file = h5py.File(weights, "r")
    except OSError as error:
        raise ValueError(f"{weights} is damaged or no HDF5 file: {error}") from None
    with file:
        projected = "CNN_proj/W_proj" in file
        state = from_variables(lambda name, shape: _variable(h5py, file, name, shape), config, projected)
    return filled(ElmoModel(config), state, torch.float32).eval()


def _plain(config: ElmoConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config_fields()}


def config_fields() -> tuple[str, ...]:
    """The fields of `ElmoConfig` that `options.json` tells."""
    return (
        *("embedding_size", "filter_sizes", "num_filters", "num_highways", "activation", "max_word_length"),
        *("hidden_size", "cell_size", "num_hidden_layers", "cell_clip", "projection_clip", "use_skip_connections"),
    )


def _variable(h5py: Any, file: Any, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """One variable of the file, of the shape that the options ask for."""
    try:
        found = file[name]
        if not isinstance(found, h5py.Dataset):
            raise ValueError(f"{name} must be a variable, got a group")
        if tuple(found.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, as {OPTIONS} says, got {tuple(found.shape)}")
        return torch.from_numpy(found[...]).float()
    except KeyError:
        raise ValueError(f"{name} {shape} is missing from {Path(file.filename).name}") from None
    except OSError as error:
        raise ValueError(f"{name} {shape} of {Path(file.filename).name} is damaged: {error}") from None


def from_variables(
    variable: Callable[[str, tuple[int, ...]], torch.Tensor], config: ElmoConfig, projected: bool = True
) -> StateDict:
    """Our state dict from TensorFlow's variables.

    Args:
        variable: a name and the shape that it must have → the tensor.
        config: of the model.
        projected: whether there is a projection of word vectors; without, ours is the identity if the widths agree.
    """
    state: StateDict = {}
    characters = variable("char_embed", (config.vocab_size - 1, config.embedding_size))
    state["embed_tokens.weight"] = torch.cat([torch.zeros_like(characters[:1]), characters])
    for index, (size, maps) in enumerate(config.filters):
        kernel = variable(f"CNN/W_cnn_{index}", (1, size, config.embedding_size, maps))
        name = f"characters.convolutions.{index}.projection"
        state[f"{name}.weight"] = kernel[0].permute(2, 1, 0).flatten(1).contiguous()
        state[f"{name}.bias"] = variable(f"CNN/b_cnn_{index}", (maps,))
    width, out = sum(maps for _, maps in config.filters), config.projection_size
    for index in range(config.num_highways):
        for ours, theirs in (("transform", "transform"), ("gate", "carry")):
            name = f"characters.highways.{index}.{ours}"
            state[f"{name}.weight"] = variable(f"CNN_high_{index}/W_{theirs}", (width, width)).t().contiguous()
            state[f"{name}.bias"] = variable(f"CNN_high_{index}/b_{theirs}", (width,))
    if projected or width != out:
        state["characters.projection.weight"] = variable("CNN_proj/W_proj", (width, out)).t().contiguous()
        state["characters.projection.bias"] = variable("CNN_proj/b_proj", (out,))
    else:
        state["characters.projection.weight"], state["characters.projection.bias"] = torch.eye(out), torch.zeros(out)
    for direction, ours in enumerate(("forwards", "backwards")):
        for layer in range(config.num_hidden_layers):
            cell = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
            state |= _direction(variable, cell, f"layers.{layer}.{ours}", config)
    return state


def _direction(variable: Any, cell: str, ours: str, config: ElmoConfig) -> StateDict:
    cells, width = config.cell_size, config.projection_size
    kernel = _reordered(variable(f"{cell}/W_0", (2 * width, 4 * cells)).t())
    return {
        f"{ours}.input_gates.weight": kernel[:, :width].contiguous(),
        f"{ours}.input_gates.bias": _reordered(variable(f"{cell}/B", (4 * cells,))),
        f"{ours}.recurrent_gates.weight": kernel[:, width:].contiguous(),
        f"{ours}.projection.weight": variable(f"{cell}/W_P_0", (cells, width)).t().contiguous(),
    }


def _reordered(gates: torch.Tensor) -> torch.Tensor:
    """Gates `(4 * cells, …)` in the other order."""
    blocks = gates.chunk(4)
    return torch.cat([blocks[index] for index in _BLOCKS])


def to_variables(model: Any) -> StateDict:
    """TensorFlow's variables of one of our models; a head is left out.

    Raises:
        ValueError: the vocabulary, the masked character or the forget bias is not ELMo's, so that there is no such file.
    """
    config = model.config
    if config.vocab_size != 262:
        raise ValueError(f"vocab_size must be 262, ELMo's characters, got {config.vocab_size}")
    if config.forget_bias != 1:
        raise ValueError(f"forget_bias must be 1, which TensorFlow adds, got {config.forget_bias}")
    body = {name: tensor.detach().float() for name, tensor in model.base_model.state_dict().items()}
    if bool(body["embed_tokens.weight"][0].any()):
        raise ValueError("embed_tokens.weight[0], of masked characters, must be zero: the file has no place for it")
    found: StateDict = {"char_embed": body["embed_tokens.weight"][1:]}
    for index, (size, maps) in enumerate(config.filters):
        name = f"characters.convolutions.{index}.projection"
        kernel = body[f"{name}.weight"].view(maps, config.embedding_size, size).permute(2, 1, 0)
        found |= {f"CNN/W_cnn_{index}": kernel[None], f"CNN/b_cnn_{index}": body[f"{name}.bias"]}
    for index in range(config.num_highways):
        for ours, theirs in (("transform", "transform"), ("gate", "carry")):
            name = f"characters.highways.{index}.{ours}"
            found[f"CNN_high_{index}/W_{theirs}"] = body[f"{name}.weight"].t()
            found[f"CNN_high_{index}/b_{theirs}"] = body[f"{name}.bias"]
    weight, bias = body["characters.projection.weight"], body["characters.projection.bias"]
    if weight.shape[0] != weight.shape[1] or not torch.equal(weight, torch.eye(len(weight))) or bool(bias.any()):
        found |= {"CNN_proj/W_proj": weight.t(), "CNN_proj/b_proj": bias}
    for direction, ours in enumerate(("forwards", "backwards")):
        for layer in range(config.num_hidden_layers):
            cell = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
            found |= _cell(body, cell, f"layers.{layer}.{ours}")
    return found


def _cell(body: StateDict, cell: str, ours: str) -> StateDict:
    kernel = torch.cat([body[f"{ours}.input_gates.weight"], body[f"{ours}.recurrent_gates.weight"]], 1)
    return {
        f"{cell}/W_0": _reordered(kernel).t(),
        f"{cell}/B": _reordered(body[f"{ours}.input_gates.bias"]),
        f"{cell}/W_P_0": body[f"{ours}.projection.weight"].t(),
    }


def write(folder: Path, variables: StateDict, options: Mapping[str, Any]) -> None:
    """Write `options.json` and `lm_weights.hdf5`, as AllenNLP and bilm-tf read them.

    Args:
        folder: that exists.
        variables: of `to_variables`.
        options: of `options_of`.
    """
    (folder / OPTIONS).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    with hdf5().File(folder / "lm_weights.hdf5", "w") as file:
        for name, tensor in variables.items():
            file[name] = tensor.contiguous().numpy()
