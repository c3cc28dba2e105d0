"""The weight a fused path may use, whatever wraps the module."""

from __future__ import annotations

import peft
import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn.utils import parametrizations

from hf_lnlm.nn.effective_weight import effective_weight, is_plain_linear


def check(module: nn.Module, plain: bool, tolerance: float = 1e-6) -> None:
    """The effective weight must compute what the module computes."""
    assert is_plain_linear(module) == plain
    inputs = torch.randn(5, 6)
    weight, bias = effective_weight(module, 6, torch.float32, torch.device("cpu"))
    found = nn.functional.linear(inputs, weight, bias)
    torch.testing.assert_close(found, module(inputs), rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_plain_linear_gives_its_own_tensors(bias):
    module = nn.Linear(6, 4, bias=bias)
    weight, offset = effective_weight(module, 6, torch.float32, torch.device("cpu"))
    assert weight is module.weight
    assert offset is module.bias
    check(module, plain=True)


def with_lora(**options) -> nn.Module:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 4)), peft.LoraConfig(target_modules=["0"], r=2, **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model.base_model.model[0].eval()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.3}], ids=str)
def test_adapters(options):
    check(with_lora(**options), plain=False, tolerance=1e-5)


def test_adapters_get_their_gradients():
    module = with_lora()
    weight, _ = effective_weight(module, 6, torch.float32, torch.device("cpu"))
    weight.square().sum().backward()
    adapters = {name: p.grad for name, p in module.named_parameters() if "lora_" in name}
    assert len(adapters) == 2
    assert all(gradient is not None and gradient.any() for gradient in adapters.values())


def test_disabled_and_merged_adapters():
    module = with_lora()
    module.merge()
    check(module, plain=False, tolerance=1e-5)
    module.unmerge()
    module.enable_adapters(False)
    check(module, plain=False)
    torch.testing.assert_close(
        effective_weight(module, 6, torch.float32, torch.device("cpu"))[0], module.base_layer.weight
    )


def test_parametrised_weights():
    check(parametrizations.weight_norm(nn.Linear(6, 4)), plain=False)
    check(parametrizations.orthogonal(nn.Linear(6, 4, bias=False)), plain=False)


def test_hooks_are_seen():
    module = nn.Linear(6, 4)
    module.register_forward_hook(lambda m, inputs, output: 2 * output)
    check(module, plain=False)
    before = nn.Linear(6, 4)
    before.register_forward_pre_hook(lambda m, inputs: (3 * inputs[0],))
    check(before, plain=False)


def test_offloaded_weights():
    module = nn.Linear(6, 4)
    inputs, wanted = torch.randn(5, 6), None
    wanted = module(inputs)
    cpu_offload(module, torch.device("cpu"))
    weight, bias = effective_weight(module, 6, torch.float32, torch.device("cpu"))
    assert weight.device.type == "cpu"
    torch.testing.assert_close(nn.functional.linear(inputs, weight, bias), wanted)


def test_a_large_bias_costs_the_weight_no_digit():
    module = nn.Linear(6, 4)
    nn.init.constant_(module.bias, 3.0)
    wanted, gradient = module.weight.detach().clone(), torch.randn(4, 6)
    module.register_forward_hook(lambda module, inputs, output: None)
    weight, bias = effective_weight(module, 6, torch.float32, torch.device("cpu"))
    (weight * gradient).sum().backward()
    assert torch.equal(weight, wanted)
    assert torch.equal(bias, module.bias)
    assert torch.equal(module.weight.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    module = nn.Linear(6, 4)
    module.register_forward_hook(lambda module, inputs, output: None)
    with torch.autocast("cpu", dtype=dtype):
        under_autocast, _ = effective_weight(module, 6, torch.float32, torch.device("cpu"))
    halved, _ = effective_weight(module.to(dtype), 6, dtype, torch.device("cpu"))
    for weight in (under_autocast, halved):
        torch.testing.assert_close(weight.float(), module.weight.float(), rtol=0.02, atol=0.01)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_weights():
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(6, 4)), {nn.Linear}, torch.qint8)[0]
    inputs = torch.randn(5, 6)
    weight, bias = effective_weight(quantised, 6, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(nn.functional.linear(inputs, weight, bias), quantised(inputs), rtol=0.05, atol=0.05)


def test_bfloat16_modules_keep_their_type():
    module = with_lora().to(torch.bfloat16)
    weight, bias = effective_weight(module, 6, torch.bfloat16, torch.device("cpu"))
    assert weight.dtype == bias.dtype == torch.bfloat16
