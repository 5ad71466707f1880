"""ops.gru and ops.lstm with `recompute`: the gates are made again in backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hidden_cases import exact, make, ours
from torch import Tensor

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
    tensors = make("gru", (3, 2, 2, 3), torch.float64, backend.device, bias=bias)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_what_is_not_read(backend: Any, kind: str, reverse: bool, dtype: torch.dtype) -> None:
    """NaN in padding, in the state of a row without steps and beside the rows stays there, also
    where PyTorch's product does not leave rows apart (bfloat16, an odd width, AMX)."""
    if backend.tiny and dtype == torch.bfloat16:
        dtype = torch.float16  # there forward's products, too, are PyTorch's of the CPU
    T, B, D, H = 2, 9, 61, 3
    gates = 4 if kind == "lstm" else 3
    lengths = torch.randint(0, T + 1, (B,), device=backend.device)
    x, h, w_ih, w_hh = (
        torch.randn(size).to(backend.device, dtype)
        for size in [(T, B, D + 1), (B, H), (gates * H, D), (gates * H, H)]
    )
    padding = torch.arange(T, device=backend.device)[:, None] >= lengths

    def gradients(filler: float) -> tuple[Tensor, ...]:
        beside = torch.arange(D + 1, device=backend.device) == D
        leaves = [
            x.masked_fill(padding[..., None] | beside, filler)[..., :D],
            h.masked_fill((lengths == 0)[:, None], filler),
            w_ih.clone(),
            w_hh.clone(),
        ]
        x_leaf, h_leaf, *weights = (t.requires_grad_() for t in leaves)
        if kind == "lstm":
            options: Any = {"lengths": lengths, "reverse": reverse, "recompute": True}
            output, _ = ops.lstm(x_leaf, (h_leaf, torch.zeros_like(h_leaf)), *weights, **options)
        else:
            output, _ = ops.gru(
                x_leaf, h_leaf, *weights, lengths=lengths, reverse=reverse, recompute=True
            )
        return torch.autograd.grad(output.square().sum(), leaves)

    for nan, number in zip(gradients(torch.nan), gradients(0.5), strict=True):
        assert torch.equal(nan, number)
