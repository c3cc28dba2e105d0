"""What the operations see to whatever surrounds them: arguments that loops can't read, and autocast."""

from __future__ import annotations

import pytest
import torch

from hf_lnlm.ops.memory.dnc import dnc_memory
from hf_lnlm.ops.memory.dnc.layout import DNCOptions
from hf_lnlm.ops.memory.ntm import ntm_memory
from hf_lnlm.ops.memory.ntm.layout import NTMOptions

from .dnc import cases as dnc
from .ntm import cases as ntm

OPERATIONS = {"ntm": (ntm_memory, NTMOptions(), ntm.layer), "dnc": (dnc_memory, DNCOptions(), dnc.layer)}
UNREADABLE = {
    "whole numbers": (torch.Tensor.long, "must be one of float32, bfloat16, float16, got int64"),
    "double": (torch.Tensor.double, "must be one of float32, bfloat16, float16, got float64"),
    "sparse": (torch.Tensor.to_sparse, "must be a dense tensor"),
    "elsewhere": (lambda tensor: tensor.to("meta"), "must be on cpu as the rest is, got meta"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_a_loop_cannot_read_is_refused_by_name(operation, kind):
    pytest.importorskip("numba")
    run, options, layer = OPERATIONS[operation]
    inputs, weights, state = layer(options, dtype=torch.float32)
    change, message = UNREADABLE[kind]
    for where, group in (("weights", weights), ("state", state)):
        for field in group._fields:
            changed = group._replace(**{field: change(getattr(group, field).detach())})
            arguments = (changed, state) if where == "weights" else (weights, changed)
            with pytest.raises(ValueError, match=rf"^{where}\.{field} {message}"):
                run(inputs, *arguments, options, backend="cpu")
    for field in weights._fields:
        with pytest.raises(ValueError, match=rf"weights\.{field} must have shape"):
            run(inputs, weights._replace(**{field: getattr(weights, field)[1:]}), state, options)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backend", ["reference", "eager", "cpu"])
def test_autocast_changes_nothing(operation, backend):
    run, options, layer = OPERATIONS[operation]
    arguments = layer(options, dtype=torch.float32)
    result, wanted = ntm.gradients(run, arguments, options, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, got = run(*arguments, options, backend=backend), wanted
        if backend == "cpu":  # autograd's own gradients follow what surrounds them
            mixed, got = ntm.gradients(run, arguments, options, backend=backend)
    tensors = zip((result.outputs, *result.state, *wanted), (mixed.outputs, *mixed.state, *got), strict=True)
    assert all(one is None or torch.equal(one, other) for one, other in tensors)
