"""Recurrent state carried from batch to batch: truncated back-propagation through time.

The dataset is contiguous streams (hf_lnlm/data/bptt_streams.py): row i of batch k + 1 continues row i of batch k. The
state that a batch leaves in its `DynamicCache` is cut from its graph and handed to the next batch. It is dropped where
streams begin (the start of every epoch, and rows whose `reset` is set); document borders inside a window are the model's
own business (`position_ids`). Evaluation has a state of its own. Each process saves the state of its own streams with
the checkpoint.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from .randomness import evaluating, preserve_rng_state


def stream_fault(dataset: Any, rows: int, processes: int) -> str | None:
    """Return why a dataset can't carry state with this batch, None if it can.

    Args:
        dataset: Should have `num_streams`, as `hf_lnlm.data.bptt_streams.BPTTStreams` does.
        rows: Rows of a batch on one process.
        processes: Number of processes; each has its own streams.
    """
    streams = getattr(dataset, "num_streams", None)
    if streams is None:
        return f"carry_state needs a dataset of contiguous streams (with num_streams), got {type(dataset).__name__}"
    if streams != rows * processes:
        return f"num_streams must be batch size x processes = {rows} x {processes} = {rows * processes}, got {streams}"
    return None


def state_file(folder: str | Path, process: int, processes: int) -> Path:
    """Return the file of a checkpoint that holds the carried state of one process.

    Args:
        folder: The checkpoint.
        process: Number of this process.
        processes: Number of all.
    """
    return Path(folder) / (
        "recurrent_state.safetensors" if processes == 1 else f"recurrent_state_{process}.safetensors"
    )


class CarriedState:
    """What the streams of one process remember between batches; empty at the start of the streams."""

    def __init__(self) -> None:
        self.cache: Any = None  # a DynamicCache whose layers are recurrent states

    def arguments(self, model: Any, rows: int, reset: torch.Tensor | None = None) -> dict[str, Any]:
        """Return what `forward` is given of it; see `start`.

        Args:
            model: The unwrapped model.
            rows: Rows of the batch.
            reset: `(rows,)` true for rows that begin anew, or None.
        """
        return {"past_key_values": self.start(model, rows, reset), "use_cache": True}

    def keep_from(self, outputs: Any) -> None:
        """Take the state out of a batch's outputs; see `keep`."""
        self.keep(outputs.get("past_key_values"))

    def start(self, model: Any, rows: int, reset: torch.Tensor | None = None) -> DynamicCache:
        """Return the cache for the next batch.

        Args:
            model: The unwrapped model.
            rows: Rows of the batch.
            reset: `(rows,)` true for rows that begin anew, or None.

        Raises:
            ValueError: If the state belongs to another number of rows.
        """
        if self.cache is None or (reset is not None and bool(reset.all())):
            return DynamicCache(config=model.config)
        held = next((layer.batch_size for layer in self.cache.layers if layer.batch_size is not None), rows)
        if held != rows:
            raise ValueError(f"the carried state has {held} rows and the batch {rows}: the batch size can't change")
        if reset is not None and bool(reset.any()):
            self._reset_rows(model, reset)
        return self.cache

    def _reset_rows(self, model: Any, reset: torch.Tensor) -> None:
        """Give the model's initial state, which needn't be zero, to some rows."""
        initial = initial_state(model, reset.shape[0], reset.device)
        for layer, fresh in zip(self.cache.layers, initial.layers, strict=True):
            layer.take_rows(fresh, reset)

    def keep(self, cache: Any) -> None:
        """Take the state that a batch left and cut it from its graph.

        Raises:
            ValueError: If the model returned no state, or one that isn't recurrent.
        """
        layers = getattr(cache, "layers", [])
        if not layers or not all(hasattr(layer, "detach_") for layer in layers):
            raise ValueError("carry_state needs a model that returns recurrent states only as past_key_values")
        for layer in layers:
            layer.detach_()
        self.cache = cache

    def save(self, path: Path) -> None:
        """Write the state, `layer.name` → tensor, with what wrote it and how far it is; nothing if it is empty."""
        if self.cache is None:
            return
        layers = self.cache.layers
        tensors = {f"{i}.{name}": t.contiguous() for i, layer in enumerate(layers) for name, t in layer.states.items()}
        about = [{"kind": layer.kind, "seen_tokens": layer.seen_tokens} for layer in layers]
        save_file(tensors, path, metadata={"layers": json.dumps(about)})

    def load(self, path: Path, model: Any, device: torch.device) -> None:
        """Read what `save` wrote.

        Args:
            path: Of the file.
            model: The unwrapped model.
            device: Where the state goes.

        Raises:
            ValueError: If the file is missing or belongs to another model.
        """
        if not path.is_file():
            raise ValueError(f"carry_state can't be resumed: {path} is missing")
        self.cache = DynamicCache(config=model.config)
        with safe_open(path, framework="pt", device=str(device)) as stream:
            about = json.loads(stream.metadata()["layers"])
            if len(about) != len(self.cache.layers):
                raise ValueError(f"{path} has {len(about)} layers, the model {len(self.cache.layers)}")
            states: list[dict[str, torch.Tensor]] = [{} for _ in about]
            for name in stream.keys():  # noqa: SIM118 - the handle isn't a mapping
                layer, _, state = name.partition(".")
                # a copy: the mapped file leaves tensors at odd addresses, which some processors multiply to other bits
                states[int(layer)][state] = stream.get_tensor(name).clone()
        for layer, entry, tensors in zip(self.cache.layers, about, states, strict=True):
            layer.write(entry["kind"], tensors, entry["seen_tokens"])


class CarriedMemory:
    """What XLNet remembers of earlier rows of its streams: `mems`, the hidden states (Yang et al. 2019, §2.4)."""

    def __init__(self) -> None:
        self.mems: list[torch.Tensor] | None = None  # of each layer `(memory length, rows, width)`

    def arguments(self, model: Any, rows: int, reset: torch.Tensor | None = None) -> dict[str, Any]:
        """Return what `forward` is given of it.

        Args:
            model: The unwrapped model.
            rows: Rows of the batch.
            reset: `(rows,)` true for rows that begin anew, or None.

        Raises:
            ValueError: If the memory belongs to another number of rows, or only some rows begin anew.
        """
        if reset is not None and bool(reset.any()):
            if not bool(reset.all()):
                raise ValueError("a memory is forgotten for all rows of a batch at once: streams must be equally long")
            self.mems = None
        if self.mems is not None and self.mems[0].shape[1] != rows:
            held = self.mems[0].shape[1]
            raise ValueError(f"the carried memory has {held} rows and the batch {rows}: the batch size can't change")
        return {"mems": self.mems, "use_mems": True}

    def keep_from(self, outputs: Any) -> None:
        """Take the memory out of a batch's outputs.

        Raises:
            ValueError: If the model returned none.
        """
        if not outputs.get("mems"):
            raise ValueError("carry_state needs a model that returns a memory as mems")
        self.mems = [memory.detach() for memory in outputs["mems"]]

    def save(self, path: Path) -> None:
        """Write the memory, layer by layer; nothing if it is empty."""
        if self.mems is not None:
            save_file({str(layer): memory.contiguous() for layer, memory in enumerate(self.mems)}, path)

    def load(self, path: Path, model: Any, device: torch.device) -> None:
        """Read what `save` wrote.

        Args:
            path: Of the file.
            model: The unwrapped model.
            device: Where the memory goes.

        Raises:
            ValueError: If the file is missing or belongs to another model.
        """
        if not path.is_file():
            raise ValueError(f"carry_state can't be resumed: {path} is missing")
        held = load_file(path, device=str(device))
        if len(held) != model.config.num_hidden_layers:
            raise ValueError(f"{path} has {len(held)} layers, the model {model.config.num_hidden_layers}")
        self.mems = [held[str(layer)] for layer in range(len(held))]


def carried_by(model: Any) -> CarriedState | CarriedMemory | None:
    """Return an empty holder of what a model can carry from batch to batch, None if there is nothing.

    Args:
        model: The unwrapped model.
    """
    if getattr(model, "_is_stateful", False):
        return CarriedState()
    return CarriedMemory() if getattr(model.config, "mem_len", None) else None


def initial_state(model: Any, rows: int, device: torch.device) -> Any:
    """Return the state before the first token: that which a wholly masked token leaves.

    Args:
        model: The unwrapped model.
        rows: Number of rows.
        device: Where to compute it.
    """
    cache = DynamicCache(config=model.config)
    token = torch.zeros(rows, 1, dtype=torch.long, device=device)
    with evaluating(model), preserve_rng_state():
        model(input_ids=token, attention_mask=torch.zeros_like(token), past_key_values=cache, use_cache=True)
    return cache
