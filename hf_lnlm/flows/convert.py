"""Conversion: a checkpoint of another project in, a folder like any other of ours out, and back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..convert.sources import Source
from ..convert.table import CONVERTERS, Converter, converter, recognised
from ..data.tokenizers import check_vocabulary, fit_length
from ..errors import UsageProblem
from ..hub.card import auto_class, write_card
from .coerce import parse_yaml
from .models import load_config, load_tokenizer, load_trained
from .output import quiet_libraries, say
from .recipe import ModelSection

_FILES = ("*.json", "*.safetensors", "pytorch_model.bin", "*.txt", "*.model", "*.hdf5")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")


def convert(
    source: str | Path,
    output: str | Path,
    *,
    from_kind: str | None = None,
    to_kind: str | None = None,
    tokenizer: str | Path | None = None,
    into: str | Path | None = None,
    fields: Mapping[str, Any] | Sequence[str] = (),
) -> Path:
    """Bring a checkpoint of another project in, or one of ours out, as `hf-lnlm convert` does.

    Args:
        source: a folder, file or Hub repository.
        output: folder for the result; new or empty.
        from_kind: what the source is, a row of `convert.table.CONVERTERS`; None for what can be told from it.
        to_kind: what becomes of a checkpoint of ours.
        tokenizer: folder of the tokenizer that goes beside it; None for the source's own, if it has one.
        into: the checkpoint whose embeddings word vectors fill.
        fields: fields of our config, as values or as `name=value`.

    Returns:
        The folder.

    Raises:
        ValueError: the source is of no kind that comes in, or doesn't fit; nothing has been written then.
    """
    target = Path(output)
    if from_kind is not None and to_kind is not None:
        raise UsageProblem("--from brings a checkpoint in and --to takes one out; give one of them")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageProblem(f"{target} is there already: --output wants a new folder")
    for kind in filter(None, (from_kind, to_kind)):
        converter(kind)  # a wrong name is said before anything is read
    place = _local(source)
    values = dict(fields) if isinstance(fields, Mapping) else dict(_field(item) for item in fields)
    with quiet_libraries():
        if to_kind is not None:
            made, words = _taken_out(str(place), converter(to_kind), values), None
        else:
            read_from = Source(place, None if into is None else Path(into), values)
            made, words = _brought_in(read_from, from_kind, tokenizer)
        beside = _tokenizer(place if into is None else Path(into), tokenizer, made, words)
        _write(made, beside, target)
    return target


def _field(item: str) -> tuple[str, Any]:
    name, equals, text = item.partition("=")
    if not equals or not name.isidentifier():
        raise UsageProblem(f"--set wants field=value here, got {item!r}")
    return name, parse_yaml(text, f"--set {name}")


def _local(source: str | Path) -> Path:
    """Where a source lies; one on the Hub is fetched, without its code."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise UsageProblem(f"no such file or folder: {source}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0][:200]
        raise UsageProblem(f"{source} is nothing here, and the Hub doesn't give it: {said}") from None


def _brought_in(source: Source, kind: str | None, tokenizer: str | Path | None) -> tuple[Any, Any]:
    """The model, and the tokenizer that the project's own vocabulary makes, if it has one that is wanted."""
    row = converter(kind) if kind is not None else recognised(source)
    if row is None:
        known = ", ".join(row.kind for row in CONVERTERS)
        what = f" (model_type {source.model_type})" if source.model_type else ""
        raise UsageProblem(f"{source.path}{what} is of no kind that can be told from it: give --from, one of {known}")
    if row.read is None:
        raise UsageProblem(f"{row.kind} only goes out: --to {row.kind}")
    if source.into is not None and row.kind != "word-vectors":
        raise UsageProblem(f"--into takes word vectors; {source.path} is {row.kind}")
    if kind is None:
        say(f"from       {row.kind}: {row.title}")
    if tokenizer is not None and row.kind == "nn.LSTM":
        source.fields.setdefault("vocab_size", len(load_tokenizer(str(tokenizer))))
    try:
        words = None if row.vocabulary is None or tokenizer is not None else row.vocabulary(source)
        return row.read(source), words
    except (ValueError, TypeError, KeyError) as error:
        said = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UsageProblem(f"{source.path} as {row.kind}: {said}") from None


def _taken_out(name: str, row: Converter, values: Mapping[str, Any]) -> Any:
    if row.write is None:
        known = ", ".join(other.kind for other in CONVERTERS if other.write)
        raise UsageProblem(f"{row.kind} only comes in; these go out: {known}")
    if values:
        raise UsageProblem(f"--set means nothing with --to, got {', '.join(values)}")
    section = ModelSection(checkpoint=name)
    config = load_config(section)
    if config.model_type != row.family:
        raise UsageProblem(f"{row.kind} is made of {row.family}, and {name} is {config.model_type}")
    model = load_trained(section, auto_class((getattr(config, "architectures", None) or [""])[0])).eval()
    try:
        return row.write(model)
    except ValueError as error:
        raise UsageProblem(f"{name} as {row.kind}: {' '.join(str(error).split())}") from None


def _tokenizer(place: Path, given: str | Path | None, made: Any, words: Any = None) -> Any:
    """The tokenizer that goes beside the result, None if there is none; `words` is one made of the project's own files."""
    if words is not None:
        check_vocabulary(words, made.config)
        return fit_length(words, made.config)
    if given is None and not any((place / name).is_file() for name in _TOKENIZERS):
        return None
    tokenizer = load_tokenizer(str(place if given is None else given))
    if isinstance(made, tuple):
        return tokenizer
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if given is not None and getattr(made.config, name, 0) is None:
            setattr(made.config, name, getattr(tokenizer, name))
    check_vocabulary(tokenizer, made.config)
    return fit_length(tokenizer, made.config)


def _write(made: Any, tokenizer: Any, target: Path) -> None:
    """Write all or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        folder = scratch / target.name
        folder.mkdir()
        if isinstance(made, tuple):
            _write_foreign(folder, *made)
        else:
            made.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if not isinstance(made, tuple):
            write_card(folder)
        if target.exists():
            target.rmdir()
        os.replace(folder, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_foreign(folder: Path, state: dict[str, Any], config: dict[str, Any] | None, write: Any = None) -> None:
    """Tensors, and the config where their project keeps one: that project reads `pytorch_model.bin`, or has a `write`."""
    if write is not None:
        write(folder, state, config)
        return
    if config is None:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "weights.safetensors")
        return
    import torch

    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    torch.save({name: tensor.clone() for name, tensor in state.items()}, folder / "pytorch_model.bin")
