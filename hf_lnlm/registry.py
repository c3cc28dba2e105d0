"""The table of families: what the package adds to transformers, one row each.

Registration with the Auto classes, `hf-lnlm list`, the README's tables, LoRA's default targets and the contract tests are
all derived from `FAMILIES`. Adding a family means adding a row here and writing its configuration, its modeling file and
its card; `python -m hf_lnlm.registry --write` then renews the README's tables, and `--check` tells whether they are due.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

PREFIX = "lnlm_"
ROOMS = "hf_lnlm.models"


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        model_type: its name in configs, with the prefix `lnlm_`.
        title: its name for people.
        room: folder under `hf_lnlm/models`.
        name: stem of `configuration_<name>.py` and `modeling_<name>.py`.
        config: name of its config class.
        models: Auto class → name of the model class that it builds. Auto classes are named as in transformers.
        extra_models: public model classes without an Auto class.
        paper: what it implements: authors, year, title.
        sizes: `tiny`, `small`, `base` → config fields, for `--size`.
        bidirectional: config fields that make it read both ways, if it can do either.
        lora_targets: module names that LoRA adapts by default.
        lora_parameters: raw parameters that LoRA reaches through `target_parameters`.
        lora_trained: module names that are trained in full beside the adapters, the classifier aside.
        norm_layers: module names of normalisation layers, which LN-tuning trains; none if it has none.
        takes_prefix: whether its cache, where it has one, takes the learnt keys and values of prefix tuning.
        tokenizer: kind of tokenizer that it reads, if it is one of its own.
        defaults: kind of learning → what a run takes where nothing is said; see `flows.defaults.Default`.
        demo: config fields of its row in the demo's table of causal models, or None to leave it out.
    """

    model_type: str
    title: str
    room: str
    name: str
    config: str
    models: dict[str, str]
    paper: str
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    lora_targets: tuple[str, ...] = ()
    lora_parameters: tuple[str, ...] = ()
    lora_trained: tuple[str, ...] = ()
    norm_layers: tuple[str, ...] = ()
    takes_prefix: bool = False
    extra_models: tuple[str, ...] = ()
    bidirectional: dict[str, Any] | None = None
    tokenizer: str | None = None
    demo: dict[str, dict[str, Any]] = field(default_factory=dict)
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def config_module(self) -> str:
        """Dotted name of the configuration module."""
        return f"{ROOMS}.{self.room}.configuration_{self.name}"

    @property
    def modeling_module(self) -> str:
        """Dotted name of the modeling module."""
        return f"{ROOMS}.{self.room}.modeling_{self.name}"

    @property
    def config_class(self) -> Any:
        """The config class, imported."""
        return getattr(importlib.import_module(self.config_module), self.config)

    def model_class(self, auto_class: str) -> type:
        """Return the class that an Auto class builds for this family.

        Raises:
            ValueError: the family has no such head; the message lists the heads it has.
        """
        if auto_class not in self.models:
            raise ValueError(f"{self.model_type} has no {auto_class}: it has {', '.join(self.models)}")
        return getattr(importlib.import_module(self.modeling_module), self.models[auto_class])

    def auto_map(self) -> dict[str, str]:
        """Return the `auto_map` of a checkpoint that carries its code: every Auto class → `file.Class`."""
        heads = {auto: f"modeling_{self.name}.{cls}" for auto, cls in self.models.items()}
        return {"AutoConfig": f"configuration_{self.name}.{self.config}", **heads}


def _heads(prefix: str, *heads: str) -> dict[str, str]:
    """A base model and its heads: Auto class → model class, both named as in transformers."""
    return {"AutoModel": f"{prefix}Model"} | {f"AutoModelFor{head}": f"{prefix}For{head}" for head in heads}


_ATTENTION_SIZES = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "small": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}
_MEMORY_SIZES = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 1, "memory_size": 32},
    "small": {"hidden_size": 384, "num_hidden_layers": 2, "memory_size": 64},
    "base": {"hidden_size": 768, "num_hidden_layers": 4, "memory_size": 128, "num_read_heads": 4},
}
_ENCODER_TARGETS = (
    *("query", "key", "value", "q_lin", "k_lin", "v_lin", "query_proj", "key_proj", "value_proj", "in_proj"),
    *("q", "k", "v", "o", "Wqkv", "Wo", "input_gates", "recurrent_gates"),
)
_ENCODER_NORMS = (
    *("LayerNorm", "layer_norm", "norm", "sa_layer_norm", "output_layer_norm", "full_layer_layer_norm"),
    *("ln_1", "ln_2", "ln_f", "attn_norm", "mlp_norm", "final_norm", "final_layer_norm", "attention_norm"),
)
"""What LoRA and LN-tuning look for in models that stand inside another, stock or the package's own."""

FAMILIES: tuple[Family, ...] = (
    Family(
        model_type="lnlm_rnn",
        title="LSTM / GRU",
        room="recurrent",
        name="rnn",
        config="RNNConfig",
        models=_heads(
            "RNN", "CausalLM", "MaskedLM", "QuestionAnswering", "SequenceClassification", "TokenClassification"
        ),
        paper="Hochreiter and Schmidhuber 1997; Cho et al. 2014; Merity, Keskar and Socher 2017",
        sizes={
            "tiny": {"hidden_size": 128, "num_hidden_layers": 1},
            "small": {"hidden_size": 512, "num_hidden_layers": 2},
            "base": {"hidden_size": 1150, "embedding_size": 400, "num_hidden_layers": 3},
        },
        bidirectional={"bidirectional": True},
        lora_targets=("input_gates", "recurrent_gates", "embedding_projection", "output_projection"),
        defaults={"classification": {"learning_rate": 2e-3, "batch_size": 32, "measured": True}},
        demo={
            "RNN-LSTM": {"cell_type": "lstm", "num_hidden_layers": 1, "learning_rate": 8e-3},
            "RNN-GRU": {"cell_type": "gru", "num_hidden_layers": 1, "learning_rate": 8e-3},
        },
    ),
    Family(
        model_type="lnlm_seq2seq",
        title="Recurrent sequence-to-sequence",
        room="recurrent",
        name="seq2seq",
        config="RNNSeq2SeqConfig",
        models={
            "AutoModel": "RNNSeq2SeqModel",
            "AutoModelForSeq2SeqLM": "RNNSeq2SeqForConditionalGeneration",
            "AutoModelForSequenceClassification": "RNNSeq2SeqForSequenceClassification",
        },
        paper="Sutskever, Vinyals and Le 2014; Bahdanau, Cho and Bengio 2015; Luong, Pham and Manning 2015",
        sizes={
            "tiny": {"hidden_size": 128, "num_hidden_layers": 1},
            "small": {"hidden_size": 256, "num_hidden_layers": 1, "hidden_dropout": 0.2, "output_dropout": 0.2},
            "base": {"hidden_size": 1000, "num_hidden_layers": 4, "hidden_dropout": 0.2, "input_feeding": True},
        },
        lora_targets=("input_gates", "recurrent_gates", "key", "combine", "embedding_projection", "output_projection"),
    ),
    Family(
        model_type="lnlm_elmo",
        title="ELMo",
        room="recurrent",
        name="elmo",
        config="ElmoConfig",
        models=_heads("Elmo", "PreTraining", "SequenceClassification", "TokenClassification"),
        paper="Peters et al. 2018, Deep contextualized word representations",
        sizes={
            "tiny": {
                "hidden_size": 128,
                "cell_size": 128,
                "num_filters": [16, 16, 32, 32, 32],
                "filter_sizes": [1, 2, 3, 4, 5],
            },
            "small": {
                "hidden_size": 512,
                "cell_size": 1024,
                "num_filters": [32, 32, 64, 128, 256, 512],
                "filter_sizes": [1, 2, 3, 4, 5, 6],
            },
            "base": {"hidden_size": 1024, "cell_size": 4096},
        },
        lora_targets=("input_gates", "recurrent_gates", "projection", "transform", "gate"),
        lora_trained=("mix",),
        tokenizer="elmo",
    ),
    Family(
        model_type="lnlm_text_cnn",
        title="TextCNN",
        room="convolutional",
        name="text_cnn",
        config="TextCNNConfig",
        models=_heads("TextCNN", "SequenceClassification"),
        paper="Kim 2014, Convolutional Neural Networks for Sentence Classification",
        sizes={
            "tiny": {"hidden_size": 64, "num_filters": 32},
            "small": {"hidden_size": 128, "num_filters": 100},
            "base": {"hidden_size": 300, "num_filters": 100},
        },
        defaults={
            "classification": {"learning_rate": 4e-3, "tokenizer": "word", "batch_size": 32, "measured": True},
        },
        lora_targets=("projection",),
    ),
    Family(
        model_type="lnlm_char_cnn",
        title="Character CNN",
        room="convolutional",
        name="char_cnn",
        config="CharCNNConfig",
        models=_heads("CharCNN", "SequenceClassification"),
        paper="Zhang, Zhao and LeCun 2015, Character-level Convolutional Networks for Text Classification",
        sizes={
            "tiny": {"num_filters": 64, "intermediate_size": 256},
            "small": {"num_filters": 256, "intermediate_size": 1024},
            "base": {"num_filters": 1024, "intermediate_size": 2048, "initializer_range": 0.02},
        },
        lora_targets=("projection", "dense.0", "dense.1"),
    ),
    Family(
        model_type="lnlm_vdcnn",
        title="VDCNN",
        room="convolutional",
        name="vdcnn",
        config="VDCNNConfig",
        models=_heads("VDCNN", "SequenceClassification"),
        paper="Conneau et al. 2017, Very Deep Convolutional Networks for Text Classification",
        sizes={
            "tiny": {"num_hidden_layers": 4, "stage_channels": [16, 32, 64, 128], "intermediate_size": 256},
            "small": {"num_hidden_layers": 4, "normalization": "batch"},
            "base": {"num_hidden_layers": 14, "stage_blocks": [5, 5, 2, 2], "normalization": "batch"},
        },
        lora_targets=("projection", "dense.0", "dense.1"),
        norm_layers=("first_norm", "second_norm"),
    ),
    Family(
        model_type="lnlm_gated_cnn",
        title="Gated CNN",
        room="convolutional",
        name="gated_cnn",
        config="GatedCNNConfig",
        models=_heads("GatedCNN", "CausalLM", "SequenceClassification"),
        paper="Dauphin et al. 2017, Language Modeling with Gated Convolutional Networks",
        sizes={
            "tiny": {"hidden_size": 128, "num_hidden_layers": 4},
            "small": {"hidden_size": 512, "num_hidden_layers": 8},
            "base": {"hidden_size": 900, "embedding_size": 280, "num_hidden_layers": 8, "kernel_width": 4},
        },
        lora_targets=("projection",),
        demo={"GatedCNN": {"num_hidden_layers": 3, "kernel_width": 3, "learning_rate": 8e-3}},
    ),
    Family(
        model_type="lnlm_ssm",
        title="Selective state space model",
        room="state_space",
        name="ssm",
        config="SelectiveSSMConfig",
        models=_heads(
            "SelectiveSSM", "CausalLM", "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"
        ),
        paper="Gu and Dao 2023; Dao and Gu 2024; Lahoti et al. 2026",
        sizes={
            "tiny": {"hidden_size": 64, "num_hidden_layers": 2},
            "small": {"hidden_size": 256, "num_hidden_layers": 4},
            "base": {"hidden_size": 768, "num_hidden_layers": 24},
        },
        bidirectional={"bidirectional": "tied"},
        lora_targets=("in_proj", "x_proj", "out_proj"),
        norm_layers=("norm", "B_norm", "C_norm"),
        demo={"SSM": {"num_hidden_layers": 1, "learning_rate": 8e-3}},
    ),
    Family(
        model_type="lnlm_ntm",
        title="Neural Turing Machine",
        room="memory",
        name="ntm",
        config="NTMConfig",
        models=_heads(
            "NTM", "CausalLM", "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"
        ),
        extra_models=("NTMForSequenceTransduction",),
        paper="Graves, Wayne and Danihelka 2014; Collier and Beel 2018",
        sizes=_MEMORY_SIZES,
        bidirectional={"bidirectional": True},
        lora_targets=("input_proj", "recurrent_proj", "interface_proj", "output_proj"),
        norm_layers=("norm",),
        demo={"NTM": {"memory_size": 32}},
    ),
    Family(
        model_type="lnlm_dnc",
        title="Differentiable Neural Computer",
        room="memory",
        name="dnc",
        config="DNCConfig",
        models=_heads(
            "DNC", "CausalLM", "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"
        ),
        extra_models=("DNCForSequenceTransduction",),
        paper="Graves et al. 2016; Csordás and Schmidhuber 2019; Franke, Niehues and Waibel 2018",
        sizes=_MEMORY_SIZES,
        bidirectional={"bidirectional": True},
        lora_targets=("input_proj", "recurrent_proj", "interface_proj", "output_proj"),
        norm_layers=("norm",),
        demo={"DNC": {"memory_size": 32}},
    ),
    Family(
        model_type="lnlm_encoder_cnn",
        title="Encoder + CNN (BERT-CNN)",
        room="hybrid",
        name="encoder_cnn",
        config="EncoderCNNConfig",
        models=_heads("EncoderCNN", "MaskedLM", "SequenceClassification", "TokenClassification"),
        paper="Safaya, Abdullatif and Yuret 2020, BERT-CNN for Offensive Speech Identification; Kim 2014",
        sizes={
            "tiny": {"hidden_size": 128, "num_hidden_layers": 2},
            "small": {"hidden_size": 512, "num_hidden_layers": 4, "mode": "last_n"},
            "base": {"hidden_size": 768, "num_hidden_layers": 12, "mode": "last_n"},
        },
        lora_targets=_ENCODER_TARGETS,
        lora_trained=("window_head", "layer_mix"),
        norm_layers=_ENCODER_NORMS,
    ),
    Family(
        model_type="lnlm_transfo_xl",
        title="Transformer-XL",
        room="hybrid",
        name="transfo_xl",
        config="TransformerXLConfig",
        models=_heads("TransformerXL", "CausalLM", "SequenceClassification"),
        paper="Dai, Yang, Yang, Carbonell, Le and Salakhutdinov 2019",
        sizes={
            "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "mem_len": 128},
            "small": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8},
            "base": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048},
        },
        lora_targets=("q_net", "kv_net", "r_net", "o_net", "fc1", "fc2"),
        norm_layers=("norm",),
        demo={"Transformer-XL": {"num_hidden_layers": 2, "mem_len": 192, "width_step": 16, "learning_rate": 2e-3}},
    ),
    Family(
        model_type="lnlm_linformer",
        title="Linformer",
        room="sparse_attention",
        name="linformer",
        config="LinformerConfig",
        models=_heads(
            "Linformer",
            "CausalLM",
            "MaskedLM",
            "MultipleChoice",
            "PreTraining",
            "QuestionAnswering",
            "SequenceClassification",
            "TokenClassification",
        ),
        paper="Wang, Li, Khabsa, Fang and Ma 2020",
        sizes=_ATTENTION_SIZES,
        lora_targets=("query", "key", "value", "dense", "intermediate", "output"),
        norm_layers=("embedding_norm", "norm"),
        takes_prefix=True,
    ),
    Family(
        model_type="lnlm_sparse_transformer",
        title="Sparse Transformer",
        room="sparse_attention",
        name="sparse_transformer",
        config="SparseTransformerConfig",
        models=_heads("SparseTransformer", "CausalLM", "SequenceClassification"),
        paper="Child, Gray, Radford and Sutskever 2019",
        sizes=_ATTENTION_SIZES,
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        norm_layers=("attention_norm", "mlp_norm", "norm"),
        takes_prefix=True,
        demo={
            "Sparse Transformer": {
                "num_hidden_layers": 2,
                "width_step": 16,
                "max_position_embeddings": 192,
                "stride": 48,
                "summary_size": 8,
                "initializer_range": 0.6,
                "learning_rate": 4e-3,
            }
        },
    ),
    Family(
        model_type="lnlm_gpt3",
        title="GPT-3",
        room="sparse_attention",
        name="gpt3",
        config="GPT3Config",
        models=_heads("GPT3", "CausalLM", "SequenceClassification"),
        paper="Brown et al. 2020",
        sizes=_ATTENTION_SIZES,
        lora_targets=("c_attn", "c_proj", "c_fc"),
        norm_layers=("ln_1", "ln_2", "norm"),
        takes_prefix=True,
        demo={
            "GPT-3": {
                "num_hidden_layers": 2,
                "width_step": 16,
                "max_position_embeddings": 192,
                "band_size": 32,
                "initializer_range": 0.06,
                "learning_rate": 4e-3,
            }
        },
    ),
    Family(
        model_type="lnlm_sparse_moe",
        title="Sparse mixture of experts",
        room="mixture",
        name="sparse_moe",
        config="SparseMoEConfig",
        models=_heads("SparseMoE", "CausalLM", "MaskedLM", "SequenceClassification", "TokenClassification"),
        paper="Shazeer et al. 2017; Fedus, Zoph and Shazeer 2021; Jiang et al. 2024",
        sizes=_ATTENTION_SIZES,
        bidirectional={"bidirectional": True},
        lora_targets=("c_attn", "c_proj"),
        lora_parameters=("router.weight", "experts.w_in", "experts.w_out"),
        norm_layers=("ln_1", "ln_2", "norm"),
        takes_prefix=True,
        demo={
            "Mixture": {
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "width_step": 16,
                "max_position_embeddings": 192,
                "learning_rate": 2e-3,
            }
        },
    ),
)

_PART_TARGETS = (
    *_ENCODER_TARGETS,
    *("c_attn", "q_proj", "k_proj", "v_proj", "x_proj", "projection"),
    *("input_proj", "recurrent_proj", "interface_proj", "output_proj"),
)
_COMPOSED_SIZES = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2},
    "small": {"hidden_size": 512, "num_hidden_layers": 4},
    "base": {"hidden_size": 768, "num_hidden_layers": 12},
}

COMPOSED: tuple[Family, ...] = (
    Family(
        model_type="lnlm_replaced_token",
        title="Generator and discriminator",
        room="composed",
        name="replaced_token",
        config="ReplacedTokenConfig",
        models={"AutoModelForPreTraining": "ReplacedTokenForPreTraining"},
        paper="Clark, Luong, Le and Manning 2020",
        sizes=_COMPOSED_SIZES,
        lora_targets=_PART_TARGETS,
        norm_layers=_ENCODER_NORMS,
    ),
    Family(
        model_type="lnlm_sentence_pair",
        title="Encoder with a judge of pairs",
        room="composed",
        name="sentence_pair",
        config="SentencePairConfig",
        models={"AutoModelForPreTraining": "SentencePairForPreTraining"},
        paper="Devlin, Chang, Lee and Toutanova 2019; Lan et al. 2020",
        sizes=_COMPOSED_SIZES,
        lora_targets=_PART_TARGETS,
        norm_layers=_ENCODER_NORMS,
    ),
    Family(
        model_type="lnlm_bidirectional",
        title="Two language models, one each way",
        room="composed",
        name="bidirectional",
        config="BidirectionalConfig",
        models={"AutoModelForPreTraining": "BidirectionalForPreTraining"},
        paper="Peters et al. 2018",
        sizes=_COMPOSED_SIZES,
        lora_targets=_PART_TARGETS,
        norm_layers=_ENCODER_NORMS,
    ),
)
"""Models made of models of other families, ours or stock: what some objectives train. Registered and carried alike."""

ROWS = (*FAMILIES, *COMPOSED)


@cache
def _by_type() -> dict[str, Family]:
    return {family.model_type: family for family in ROWS}


def is_ours(model_type: str | None) -> bool:
    """Tell whether a model type is one of the package's, made of others or not."""
    return model_type in _by_type()


def is_composed(model_type: str | None) -> bool:
    """Tell whether a model type is that of a model made of several."""
    return any(row.model_type == model_type for row in COMPOSED)


def family(model_type: str) -> Family:
    """Return the row of a model type.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if model_type not in _by_type():
        raise ValueError(f"no family {model_type!r}: hf_lnlm has {', '.join(_by_type())}")
    return _by_type()[model_type]


def public_names() -> Iterator[tuple[str, str]]:
    """Yield (class name, module) of every config and model class, for `from hf_lnlm import X`."""
    for row in ROWS:
        yield row.config, row.config_module
        for name in dict.fromkeys([*row.models.values(), *row.extra_models]):
            yield name, row.modeling_module


def markdown_table() -> str:
    """Return the README's table of families: what it is, its `model_type`, its heads, its paper."""
    lines = ["| family | `model_type` | heads | paper |", "|---|---|---|---|"]
    for row in FAMILIES:
        heads = ", ".join(auto.removeprefix("AutoModelFor").removeprefix("AutoModel") or "Model" for auto in row.models)
        lines.append(f"| {row.title} | `{row.model_type}` | {heads} | {row.paper} |")
    return "\n".join(lines)


def write_tables(readme: Path, check: bool = False) -> bool:
    """Renew the tables of families and of objectives between their markers. Returns whether they differ from the file's.

    Args:
        readme: a Markdown file with `<!-- families -->` … `<!-- /families -->`, and the same for `objectives`.
        check: compare only.

    Raises:
        ValueError: a pair of markers is missing.
    """
    from .objectives import table

    old = text = readme.read_text(encoding="utf-8")
    for name, written in (("families", markdown_table()), ("objectives", table())):
        before, opening, rest = text.partition(f"<!-- {name} -->\n")
        _, closing, after = rest.partition(f"\n<!-- /{name} -->")
        if not closing:
            raise ValueError(f"{readme.name} must have its table between <!-- {name} --> and <!-- /{name} -->")
        text = before + opening + written + closing + after
    if not check and text != old:
        readme.write_text(text, encoding="utf-8")
    return text != old


def register() -> None:
    """Register every family with transformers' Auto classes. Safe to call twice; touches no stock entry."""
    import transformers

    for row in ROWS:
        config = row.config_class
        transformers.AutoConfig.register(row.model_type, config, exist_ok=True)
        for auto_class in row.models:
            getattr(transformers, auto_class).register(config, row.model_class(auto_class), exist_ok=True)


def main(arguments: list[str] | None = None) -> str | None:
    """`python -m hf_lnlm.registry --write | --check`. Returns what is wrong, or None.

    Args:
        arguments: default: those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m hf_lnlm.registry", description="Keep the README's tables.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="write both tables between their markers")
    action.add_argument("--check", action="store_true", help="fail if a table is not what the registry says")
    parser.add_argument("readme", nargs="?", type=Path, default=Path(__file__).parents[1] / "README.md")
    options = parser.parse_args(arguments)
    differ = write_tables(options.readme, options.check)
    return (
        f"{options.readme}'s tables are due: python -m hf_lnlm.registry --write" if differ and options.check else None
    )


if __name__ == "__main__":
    sys.exit(main())
