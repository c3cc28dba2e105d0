"""Weights that a quantiser holds in its own type: no fused path reads around it, and loading computes nothing on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.distributed import DistributedConfig

from .cases import Case, build, cases, first_output, inputs_of, one_case_a_family, tiny_config, token_ids


class Int8Weight(torch.Tensor):
    """A weight of whole numbers and scales, as quantisers make them: it is a product's operand and nothing else."""

    numbers: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, scale: torch.Tensor) -> Int8Weight:
        held = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype, device=numbers.device)
        held.numbers, held.scale = numbers, scale
        return held

    def __init__(self, numbers: torch.Tensor, scale: torch.Tensor) -> None:
        """Say nothing: `__new__` did it."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            return function(args[0], args[1].plain(), *args[2:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"{function} is not for quantised weights")

    def plain(self) -> torch.Tensor:
        return self.numbers.to(self.scale.dtype) * self.scale


def quantise(model: Any, keep: bool) -> Any:
    """Round every linear layer's weight to whole numbers; with `keep` hold it in the quantiser's type."""
    for module in model.modules():
        if type(module) is nn.Linear:
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            numbers = (module.weight.detach() / scale).round().to(torch.int8)
            weight = Int8Weight(numbers, scale)
            module.weight = nn.Parameter(weight if keep else weight.plain(), requires_grad=False)
    return model


def quantisable(case: Case) -> bool:
    return not case.composite


@pytest.mark.parametrize("case", [c for c in one_case_a_family() if quantisable(c)], ids=str)
def test_a_quantised_model_computes_by_its_modules(case: Case):
    fields = {"tie_word_embeddings": False}
    inputs = inputs_of(case)
    wanted = first_output(quantise(build(case, **fields), keep=False), **inputs)
    found = first_output(quantise(build(case, **fields), keep=True), **inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in cases(causal=True) if quantisable(c)], ids=str)
def test_a_quantised_model_generates(case: Case):
    tokens = []
    for keep in (False, True):
        model = quantise(build(case, tie_word_embeddings=False, eos_token_id=None), keep)
        tokens.append(model.generate(token_ids(2, 5), max_new_tokens=5, do_sample=False, pad_token_id=0).tolist())
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("case", [c for c in one_case_a_family() if quantisable(c)], ids=str)
def test_loaded_weights_are_not_computed_with(case: Case):
    model = quantise(build(case, tie_word_embeddings=False), keep=True)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    assert all(torch.isfinite(v).all() for v in (first_output(model, **inputs_of(case)),))


@pytest.mark.parametrize("case", one_case_a_family(), ids=str)
def test_a_model_is_made_without_memory(case: Case):
    with torch.device("meta"):
        model = case.cls(tiny_config(case))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize("case", one_case_a_family(), ids=str)
@pytest.mark.parametrize("given", [{"pp_size": 2}, DistributedConfig(pp_size=2)], ids=["fields", "config"])
def test_pipeline_stages_are_refused_by_name(case: Case, given: Any, tmp_path):
    build(case).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"pp_size must be 1: a {case.cls.__name__} has no pipeline stages, got 2"):
        case.cls.from_pretrained(tmp_path, distributed_config=given)
