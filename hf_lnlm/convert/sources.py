"""What a conversion reads: a folder or file of another project, without running anything that lies in it."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from .weights import StateDict

TENSOR_FILES = (".safetensors", ".npz", ".pt", ".pth", ".bin", ".ckpt", ".tar")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep a state dict among other things."""
_OF_FAIRSEQ = ("argparse.", "omegaconf.", "fairseq.")
_EXPORT = (
    "`from fairseq.checkpoint_utils import load_checkpoint_to_cpu as load; from safetensors.torch import save_file`, then "
    "`save_file({{name: t.clone() for name, t in load({0!r})['model'].items()}}, 'weights.safetensors')`"
)
"""The two lines for fairseq's checkpoints; `clone`, for embeddings that are shared."""


@dataclass(frozen=True)
class Source:
    """A checkpoint of another project.

    Args:
        path: its folder, or its one file.
        into: a checkpoint of ours that takes part of it (word vectors), or None.
        fields: fields of our config that it doesn't tell, or that shall be otherwise.
    """

    path: Path
    into: Path | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`; empty if there is none.

        Raises:
            ValueError: it is no JSON object.
        """
        file = self.path / "config.json"
        if not file.is_file():
            return {}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is no JSON: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{file} must hold an object, got {type(found).__name__}")
        return found

    @property
    def model_type(self) -> str:
        """What transformers calls the model; empty for files of other projects."""
        return str(self.config.get("model_type", ""))

    @property
    def weights(self) -> Path | None:
        """The file that holds the tensors, if there is one."""
        if self.path.is_file():
            return self.path if self.path.suffix in TENSOR_FILES else None
        return next((self.path / name for name in _WEIGHTS if (self.path / name).is_file()), None)

    @cached_property
    def state(self) -> StateDict:
        """The tensors by name.

        Raises:
            ValueError: there are none, or the file holds more than tensors.
        """
        if self.weights is None:
            raise ValueError(
                f"{self.path} holds no weights: {', '.join(_WEIGHTS)}, or a file {', '.join(TENSOR_FILES)}"
            )
        return read_tensors(self.weights)

    def stock(self) -> transformers.PreTrainedModel:
        """The model of transformers that a folder holds, with the head it was saved with.

        Raises:
            ValueError: transformers has no such class, the weights are no safetensors, or some are missing.
        """
        head = (self.config.get("architectures") or ["AutoModel"])[0]
        if not hasattr(transformers, head):
            raise ValueError(f"architectures of {self.path} must name a class of transformers, got {head}")
        try:
            model, report = getattr(transformers, head).from_pretrained(
                self.path, use_safetensors=True, dtype="auto", trust_remote_code=False, output_loading_info=True
            )
        except OSError as error:
            raise ValueError(f"{self.path} can't be loaded: {' '.join(str(error).split())[:300]}") from None
        if missing := sorted(report["missing_keys"]):
            more = f" and {len(missing) - 3} more" * (len(missing) > 3)
            raise ValueError(f"weights of {head} are missing: {', '.join(missing[:3])}{more}")
        return model


def read_tensors(path: Path) -> StateDict:
    """The tensors of a `.safetensors`, `.npz` or torch file; only tensors are read, and no code runs.

    Args:
        path: of the file. A training script's file may keep them under `state_dict` beside numbers and text.

    Raises:
        ValueError: the file is damaged, or holds other objects than tensors; says what to do.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    found = _arrays(path) if path.suffix == ".npz" else _unpickled(path)
    for name in _WRAPPERS:
        if isinstance(found.get(name), dict):
            found = found[name]
    others = [f"{name!r} ({type(value).__name__})" for name, value in found.items() if not torch.is_tensor(value)]
    if others or not found:
        raise ValueError(f"{path} must hold tensors by name and nothing else, got {', '.join(others[:3]) or 'nothing'}")
    return dict(found)


def _arrays(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as loaded:
            return {name: torch.from_numpy(np.array(loaded[name])) for name in loaded.files}
    except (ValueError, OSError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} must hold arrays of numbers: {error}") from None


def _unpickled(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise ValueError(f"{path} is no file of torch, or damaged: {str(error).splitlines()[0][:200]}") from None
        if named[1].startswith(_OF_FAIRSEQ):
            raise ValueError(
                f"{path} is a whole training checkpoint ({named[1]} is pickled in it), and reading it would run its code. "
                f"Where it was made, export its tensors by two lines: {_EXPORT.format(path.name)}"
            ) from None
        raise ValueError(
            f"{path} holds a pickled object ({named[1]}), and reading it would run its code. Where it was made, save the "
            "tensors alone: torch.save(model.state_dict(), 'weights.pt')"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold tensors by name, got {type(found).__name__}")
    return found
