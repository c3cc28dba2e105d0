"""The table of families: complete, consistent, and the only place that knows them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers

import hf_lnlm
from hf_lnlm import registry
from hf_lnlm.models.base import LNLMConfig, LNLMPreTrainedModel
from hf_lnlm.registry import FAMILIES, Family

from .contract.cases import Case, build, cases, is_composite

ROOT = Path(__file__).resolve().parent.parent
MATCHED_BY_TRANSFORMERS = ("mamba", "xlnet", "rwkv", "xlstm", "reformer", "minimax")

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda row: row.name)


def test_model_types_and_names_are_unique():
    assert len({row.model_type for row in FAMILIES}) == len(FAMILIES)
    assert len({row.name for row in FAMILIES}) == len(FAMILIES)
    names = [name for name, _ in registry.public_names()]
    assert len(set(names)) == len(names)


@every_family
def test_row_is_complete(family: Family):
    assert family.model_type == registry.PREFIX + family.name
    assert family.title
    assert re.search(r"\b(19|20)\d\d\b", family.paper), "a paper has a year"
    assert family.models
    assert family.lora_targets
    assert (ROOT / "hf_lnlm" / "models" / family.room / f"configuration_{family.name}.py").is_file()
    assert (ROOT / "hf_lnlm" / "models" / family.room / f"modeling_{family.name}.py").is_file()


@every_family
def test_classes_keep_the_conventions(family: Family):
    config = family.config_class
    assert issubclass(config, LNLMConfig)
    assert config.model_type == family.model_type
    classes = [family.model_class(auto) for auto in family.models]
    classes += [getattr(hf_lnlm, name) for name in family.extra_models]
    for cls in classes:
        assert issubclass(cls, LNLMPreTrainedModel)
        assert cls.config_class is config
        assert not any(word in cls.__name__.lower() for word in MATCHED_BY_TRANSFORMERS)
        parameters = inspect.signature(cls.forward).parameters
        through = "num_items_in_batch" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        assert through, "num_items_in_batch must get through"
    for field in family.demo.values():
        assert config(**field)


@every_family
def test_auto_classes_build_the_registered_classes(family: Family):
    for auto, name in family.models.items():
        mapping = getattr(transformers, auto)._model_mapping
        assert mapping[family.config_class].__name__ == name
    assert transformers.AutoConfig.for_model(family.model_type).model_type == family.model_type
    assert family.auto_map().keys() == {"AutoConfig", *family.models}


@every_family
def test_lora_targets_name_modules(family: Family):
    models = [build(Case(family, auto_class)) for auto_class in family.models]
    names = [name for model in models for name, _ in model.named_modules()]  # a target may belong to one head
    found = [any(name == target or name.endswith(f".{target}") for name in names) for target in family.lora_targets]
    assert any(found) if is_composite(family) else all(found)  # the model inside may be of many kinds
    parameters = [name for model in models for name, _ in model.named_parameters()]
    for target in family.lora_parameters:
        assert any(name.endswith(target) for name in parameters), target


@every_family
def test_sizes_grow(family: Family):
    counts = []
    for fields in family.sizes.values():
        with torch.device("meta"):
            model = family.model_class(next(iter(family.models)))(family.config_class(**fields))
        counts.append(sum(p.numel() for p in model.parameters()))
    assert counts == sorted(counts)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_weight_decay_exclusions_name_parameters(case: Case):
    model = build(case)
    parameters = {name for name, _ in model.named_parameters()}
    assert set(model.no_weight_decay()) <= parameters
    if case.cls._no_weight_decay and not case.composite:
        assert model.no_weight_decay(), "patterns that match nothing"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"lnlm_nothing.*lnlm_rnn"):
        registry.family("lnlm_nothing")
    with pytest.raises(ValueError, match=r"AutoModelForVision2Seq.*AutoModelForCausalLM"):
        registry.family("lnlm_rnn").model_class("AutoModelForVision2Seq")
    assert registry.is_ours("lnlm_rnn")
    assert not registry.is_ours("gpt2")
    assert not registry.is_ours(None)


def test_no_other_file_lists_the_families():
    """A family adds a row, two files and its own tests: nothing else in the package names its model type."""
    wrong = []
    for path in (ROOT / "hf_lnlm").rglob("*.py"):
        text = path.read_text()
        for row in FAMILIES:
            own = f"_{row.name}.py" in path.name or path.name == "registry.py" or row.room in path.parts
            if not own and f'"{row.model_type}"' in text and not {"convert", "data"} & set(path.parts):
                wrong.append(f"{path.relative_to(ROOT)} names {row.model_type}")
    assert not wrong
