"""The converters: one row for each kind of checkpoint that comes in or goes out. A kind more is one row more.

`hf-lnlm convert` and the table of `model_cards/README.md` follow from it. Modules of conversions load when a row is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from .sources import Source

Read = Callable[[Source], Any]
Write = Callable[[Any], "Written"]
Written = Any
"""A model of transformers, or `(state dict, content of config.json or None)` of another project, and then perhaps what
writes the two into a folder."""


@dataclass(frozen=True)
class Converter:
    """A kind of checkpoint.

    Attributes:
        kind: its name for `--from` and `--to`.
        title: what it is, for the table.
        family: `model_type` of ours that it becomes; `any` for what fills a checkpoint.
        examples: public checkpoints of it.
        recognises: whether a source is of it; may look at names of tensors.
        read: a source → our model; None if nothing comes in.
        write: our model → what goes out; None if nothing does.
        notes: what is exact, and what must be told.
        vocabulary: a source → the tokenizer of its words, or None if it has none; for projects whose own files no
            tokenizer of transformers reads.
    """

    kind: str
    title: str
    family: str
    examples: str
    recognises: Callable[[Source], bool]
    read: Read | None
    write: Write | None = None
    notes: str = "exact"
    vocabulary: Callable[[Source], Any] | None = None


def _from(module: str) -> Any:
    return import_module(f"hf_lnlm.convert.{module}")


def _stock(kind: str) -> Callable[[Source], bool]:
    return lambda source: source.model_type == kind


def _named(*endings: str) -> Callable[[Source], bool]:
    """Whether a file of tensors has one whose name ends so, for each ending."""

    def recognises(source: Source) -> bool:
        if source.weights is None or source.model_type:
            return False
        names = [name.removesuffix(":0") for name in source.state]
        return all(any(name.endswith(ending) for name in names) for ending in endings)

    return recognises


def _no_fields(source: Source) -> None:
    if source.fields:
        raise ValueError(f"this conversion is exact and takes no fields, got {', '.join(source.fields)}")


def _ssm(source: Source) -> Any:
    _no_fields(source)
    return _from("state_space").ssm_from_stock(source.stock())


def _original_ssm(source: Source) -> Any:
    _no_fields(source)
    return _from("state_space").ssm_from_original(source.state, source.config)


def _stock_ssm(kind: str) -> Write:
    def write(model: Any) -> Any:
        found = _from("state_space").ssm_to_stock(model)
        if found.config.model_type != kind:
            raise ValueError(f"its counterpart is {found.config.model_type}, not {kind}")
        return found

    return write


def _linformer(source: Source) -> Any:
    return _from("sparse_attention").linformer_from_stock(source.stock(), **source.fields)


def _stock_encoder(kind: str) -> Write:
    return lambda model: _from("sparse_attention").linformer_to_stock(model, kind)


def _has_rnn(source: Source) -> bool:
    """Whether all tensors are one nn.LSTM's or nn.GRU's."""
    return _named("weight_ih_l0", "weight_hh_l0")(source) and not _named("decoder.weight")(source)


def _is_original_ssm(source: Source) -> bool:
    return not source.model_type and {"d_model", "n_layer", "vocab_size"} <= source.config.keys()


def _is_transfo_xl(source: Source) -> bool:
    """By its config, the names of its tensors, or the module that its training script pickles."""
    pickled = source.path / "model.pt"
    known = source.model_type == "transfo-xl" or _named("dec_attn.qkv_net.weight", "emb_layers.0.weight")(source)
    return known or (source.weights is None and not source.config and pickled.is_file())


def _elmo_options(source: Source) -> bool:
    return not source.model_type and source.path.is_dir() and any(source.path.glob("*options.json"))


def _elmo_written(model: Any) -> Any:
    elmo = _from("elmo")
    elmo.hdf5()  # said before anything is written
    return elmo.to_variables(model), elmo.options_of(model.config), elmo.write


def _elmo_tokenizer(source: Source) -> Any:
    from ..data.tokenizers import build_tokenizer

    return build_tokenizer("elmo", template="causal")


def _has_words(source: Source) -> bool:
    path = source.path
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return path.is_file() and (
        kind in (".txt", ".vec", ".npy") or (kind == ".npz" and _named("words", "vectors")(source))
    )


CONVERTERS: tuple[Converter, ...] = (
    Converter(
        "mamba", "Mamba of transformers", "lnlm_ssm", "state-spaces/mamba-130m-hf … mamba-2.8b-hf",
        _stock("mamba"), _ssm, _stock_ssm("mamba"),
    ),
    Converter(
        "mamba2", "Mamba-2 of transformers", "lnlm_ssm", "AntonV/mamba2-130m-hf",
        _stock("mamba2"), _ssm, _stock_ssm("mamba2"),
    ),
    Converter(
        "falcon_mamba", "Falcon Mamba of transformers", "lnlm_ssm", "tiiuae/falcon-mamba-7b",
        _stock("falcon_mamba"), _ssm, _stock_ssm("falcon_mamba"),
    ),
    Converter(
        "state-spaces", "Mamba and Mamba-2 as state-spaces/mamba saves them", "lnlm_ssm",
        "state-spaces/mamba-130m … mamba2-2.7b", _is_original_ssm, _original_ssm,
        lambda model: _from("state_space").ssm_to_original(model),
        "exact; they name their tokenizer in words only: `--tokenizer`",
    ),
    Converter(
        "word_language_model", "PyTorch's word_language_model example, LSTM or GRU", "lnlm_rnn", "what the example saves",
        _named("encoder.weight", "decoder.weight", "weight_ih_l0"),
        lambda source: _from("recurrent").word_language_model(source.state, source.fields),
        lambda model: (_from("recurrent").to_word_language_model(model.state_dict(), model.config.input_scale), None),
        "exact; its tensors, not the pickled module",
    ),
    Converter(
        "fairseq-lstm", "fairseq's `lstm` and `lstm_luong_wmt_en_de`: translation", "lnlm_seq2seq",
        "what fairseq trains", _named("encoder.embed_tokens.weight", "encoder.lstm.weight_ih_l0"),
        lambda source: _from("fairseq").fairseq_lstm(source.state, source.fields),
        notes="exact; its tensors, not the pickled checkpoint; dropouts by `--set`, an adaptive softmax is refused",
    ),
    Converter(
        "nn.LSTM", "`nn.LSTM` or `nn.GRU` of torch", "lnlm_rnn", "any, one or two directions", _has_rnn,
        lambda source: _from("recurrent").torch_rnn(source.state, source.fields),
        lambda model: (_from("recurrent").to_torch_rnn(model.state_dict()), None),
        "exact; embeddings are new, so `--set vocab_size=N` or `--tokenizer`",
    ),
    Converter(
        "allennlp-elmo", "ELMo's `options.json` and HDF5 weights, AllenNLP's or bilm-tf's", "lnlm_elmo",
        "elmo_2x4096_512_2048cnn_2xhighway and the other public ones", _elmo_options,
        lambda source: _from("elmo").read(source.path, source.fields), _elmo_written,
        "exact both ways; extra `elmo` (h5py); its tokenizer is made", _elmo_tokenizer,
    ),
    Converter(
        "dnc", "google-deepmind/dnc's variables as `.npz`", "lnlm_dnc", "what its training script leaves",
        _named("lstm/w_gates", "output_linear/w"),
        lambda source: _from("memory").deepmind_dnc(source.state, source.fields),
        notes="up to two rules of the paper's memory; `--set memory_size=N`, which no weight tells",
    ),
    Converter(
        "bert", "BERT of transformers", "lnlm_linformer", "google-bert/bert-base-uncased", _stock("bert"), _linformer,
        _stock_encoder("bert"), "exact with `projected_size` = length, `projection=mean_pool`; else a start to tune",
    ),
    Converter(
        "roberta", "RoBERTa of transformers", "lnlm_linformer", "FacebookAI/roberta-base", _stock("roberta"), _linformer,
        _stock_encoder("roberta"), "as for BERT",
    ),
    Converter(
        "gpt2", "GPT-2 of transformers", "lnlm_gpt3", "openai-community/gpt2 … gpt2-xl", _stock("gpt2"),
        lambda source: _from("sparse_attention").gpt3_from_gpt2(source.stock(), **source.fields),
        notes="exact unless `--set attention_layers=…` bands layers",
    ),
    Converter(
        "gpt_neo", "GPT-Neo of transformers", "lnlm_gpt3", "EleutherAI/gpt-neo-125m … 2.7B", _stock("gpt_neo"),
        lambda source: _from("sparse_attention").gpt3_from_gpt_neo(source.stock(), **source.fields),
    ),
    Converter(
        "transfo-xl", "Transformer-XL of transformers to 4.36, and of kimiyoung/transformer-xl (PyTorch)",
        "lnlm_transfo_xl", "transfo-xl/transfo-xl-wt103", _is_transfo_xl,
        lambda source: _from("transfo_xl").transfo_xl(source),
        notes="exact; words too, without unpickling; kimiyoung's clusters in one table, memory and norms by `--set`",
        vocabulary=lambda source: _from("transfo_xl").transfo_xl_words(source),
    ),
    Converter(
        "word-vectors", "word2vec or GloVe text, `.npz`, `.npy`", "any", "GoogleNews, glove.6B, fastText's `.vec`",
        _has_words, lambda source: _from("word_vectors").filled_checkpoint(source.path, source.into, source.fields),
        notes="fills the embeddings of `--into CHECKPOINT`, by its tokenizer's words",
    ),
)  # fmt: skip
"""All of them; where several recognise a source, the first counts."""


def converter(kind: str) -> Converter:
    """The row of a kind.

    Raises:
        UsageProblem: there is none of that name.
    """
    from ..errors import unknown_name

    rows = {row.kind: row for row in CONVERTERS}
    if kind not in rows:
        raise unknown_name("kind", kind, rows)
    return rows[kind]


def recognised(source: Source) -> Converter | None:
    """The row that knows a source by what it holds, if any does."""
    return next((row for row in CONVERTERS if row.recognises(source)), None)


def markdown_table() -> str:
    """The table of `model_cards/README.md`."""
    lines = ["| `--from` | what | becomes | public checkpoints | back (`--to`) | |", "|---|---|---|---|---|---|"]
    for row in CONVERTERS:
        family = f"`{row.family}`" if row.family != "any" else "any family"
        back = "yes" if row.write else "no"
        lines.append(f"| `{row.kind}` | {row.title} | {family} | {row.examples} | {back} | {row.notes} |")
    return "\n".join(lines)
