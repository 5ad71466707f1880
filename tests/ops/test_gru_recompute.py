"""ops.gru with `recompute`: the gates are made again in backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hidden_cases import exact, make, ours

from recurrent import run, some_lengths
from seqkern import ops


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_same_results(backend: Any, state: bool, reverse: bool, lengths: bool) -> None:
    tensors = make("gru", (7, 5, 3, 9), torch.float64, backend.device, state=state)
    given = some_lengths(5, 7, backend.device) if lengths else None
    function = ours("gru", reverse=reverse, lengths=given, recompute=True)
    expected = run(exact("gru", reverse, given), tensors)
    for actual, truth in zip(run(function, tensors), expected, strict=True):
        torch.testing.assert_close(actual, truth)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients(backend: Any, bias: bool) -> None:
    tensors = make("gru", (3, 2, 3, 4), torch.float64, backend.device, bias=bias)
    function = ours("gru", recompute=True)
    leaves = tuple(t.requires_grad_() for t in tensors if t is not None)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gates_are_not_kept(backend: Any) -> None:
    """Saved are the inputs and the output, and nothing else with elements."""
    tensors: Any = make("gru", (5, 2, 3, 4), torch.float32, backend.device)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, id):
        ops.gru(*[t.requires_grad_() for t in tensors], recompute=True)
    assert sorted(n for n in sizes if n) == sorted([*(t.numel() for t in tensors), 5 * 2 * 4])
