"""What holds for the Turing machine's operation and the neural computer's alike."""

from __future__ import annotations

import torch


def check_nothing_given_is_written_to(operation, arguments, options, backend, grad):
    """A state that two calls share is the same for both, and a final state outlives its use."""
    given = [arguments[0], *arguments[1], *arguments[2]]
    before = [tensor.detach().clone() for tensor in given]
    with torch.set_grad_enabled(grad):
        first = operation(*arguments, options, backend=backend)
        again = operation(*arguments, options, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert torch.equal(first.outputs, again.outputs)
    kept = [tensor.detach().clone() for tensor in first.state]
    operation(arguments[0], arguments[1], first.state, options, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first.state, kept, strict=True))


def check_masked_steps_keep_the_state(operation, arguments, options, backend):
    """Holes, left and right padding of one row of 7 steps leave the state that the real steps alone leave."""
    inputs, weights, state = arguments
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0]]).bool()
    result = operation(inputs, weights, state, options, mask, backend=backend)
    alone = operation(inputs[:, mask[0]], weights, state, options, backend=backend)
    for one, other in zip(result.state, alone.state, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.outputs[:, mask[0]], alone.outputs, rtol=1e-5, atol=1e-6)
    assert not result.outputs[:, ~mask[0]].any()
