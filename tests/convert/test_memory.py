"""google-deepmind/dnc's variables, mapped to ours, compute the same as its own layout does."""

from __future__ import annotations

import pytest
import torch

from hf_lnlm import DNCConfig, DNCForSequenceTransduction
from hf_lnlm.convert.memory import from_deepmind_dnc
from hf_lnlm.ops.memory.dnc.reference import memory_step

SIZE, INPUTS, OUTPUTS, WIDTH, SLOTS = 11, 5, 3, 4, 9


def config(reads: int, writes: int, **fields) -> DNCConfig:
    return DNCConfig(
        hidden_size=OUTPUTS, input_size=INPUTS, output_size=OUTPUTS, controller_size=SIZE, memory_size=SLOTS,
        memory_width=WIDTH, num_read_heads=reads, num_write_heads=writes, **({"residual": False} | fields),
    )  # fmt: skip


def variables(reads: int, writes: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "write_vectors": writes * WIDTH, "erase_vectors": writes * WIDTH, "free_gate": reads, "allocation_gate": writes,
        "write_gate": writes, "read_mode": reads * (1 + 2 * writes), "write_keys": writes * WIDTH,
        "write_strengths": writes, "read_keys": reads * WIDTH, "read_strengths": reads,
    }  # fmt: skip
    inside = INPUTS + reads * WIDTH
    shapes = {"dnc/lstm/w_gates:0": (inside + SIZE, 4 * SIZE), "dnc/lstm/b_gates:0": (4 * SIZE,)}
    for name, length in sizes.items():
        shapes |= {f"dnc/memory_access/{name}/w:0": (SIZE, length), f"dnc/memory_access/{name}/b:0": (length,)}
    shapes |= {"dnc/output_linear/w:0": (SIZE + reads * WIDTH, OUTPUTS), "dnc/output_linear/b:0": (OUTPUTS,)}
    return {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}


def their_layout(found: dict[str, torch.Tensor], cell, inputs: torch.Tensor, reads: int, writes: int) -> torch.Tensor:
    """Step by step as their modules are wired; the memory itself by our reference."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ found[f"dnc/memory_access/{name}/w:0"] + found[f"dnc/memory_access/{name}/b:0"]

    state, outputs = cell.initial_states(len(inputs), inputs), []
    for x in inputs.unbind(1):
        gates = torch.cat([x, state.reads, state.hidden], 1) @ found["dnc/lstm/w_gates:0"] + found["dnc/lstm/b_gates:0"]
        gate_in, candidate, forget, gate_out = gates.chunk(4, 1)
        cells = (forget + 1.0).sigmoid() * state.cells + gate_in.sigmoid() * candidate.tanh()
        hidden = gate_out.sigmoid() * cells.tanh()
        mode = linear("read_mode", hidden).unflatten(1, (reads, 1 + 2 * writes))
        backward, forward, content = mode.split([writes, writes, 1], 2)
        names = ["read_keys", "read_strengths", "write_keys", "write_strengths", "erase_vectors", "write_vectors"]
        names += ["free_gate", "allocation_gate", "write_gate"]
        parts = [linear(name, hidden) for name in names]
        interface = torch.cat([*parts, torch.cat([backward, content, forward], 2).flatten(1)], 1)
        state = memory_step(interface, state._replace(hidden=hidden, cells=cells), cell.options)
        joined = torch.cat([hidden, state.reads], 1)
        outputs.append(joined @ found["dnc/output_linear/w:0"] + found["dnc/output_linear/b:0"])
    return torch.stack(outputs, 1)


@pytest.mark.parametrize(("reads", "writes"), [(1, 1), (2, 1), (2, 2)])
def test_mapped_variables_compute_the_same(reads, writes):
    found, model = variables(reads, writes), DNCForSequenceTransduction(config(reads, writes)).eval()
    model.load_state_dict(from_deepmind_dnc(found, model.config))
    inputs = torch.randn(2, 7, INPUTS, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = their_layout(found, model.model.layers[0].forwards, inputs, reads, writes)
        torch.testing.assert_close(model(inputs_embeds=inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_given_variables_are_left_alone():
    found = variables(1, 1)
    before = {name: tensor.clone() for name, tensor in found.items()}
    from_deepmind_dnc(found, config(1, 1))
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (lambda v: v.pop("dnc/lstm/b_gates:0"), {}, "exactly one lstm/b_gates"),
        (lambda v: v.update({"other/read_keys/w": torch.zeros(1)}), {}, "exactly one read_keys/w"),
        (lambda v: v.update({"dnc/output_linear/b:0": torch.zeros(9)}), {}, "shape"),
        (lambda v: None, {"residual": True}, "residual"),
        (lambda v: None, {"use_temporal_links": False}, "use_temporal_links"),
        (lambda v: None, {"use_deallocation": True}, "use_deallocation"),
        (lambda v: None, {"controller_type": "feedforward"}, "controller_type"),
    ],
)
def test_what_does_not_fit_is_refused(change, fields, message):
    found = variables(1, 1)
    change(found)
    with pytest.raises(ValueError, match=message):
        from_deepmind_dnc(found, config(1, 1, **fields))
