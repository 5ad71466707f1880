"""ops.linear_cross_entropy of what is not plain: batched gradients, fakes, vmap, a mixed bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from seqkern import ops


def make(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, 5, dtype=dtype), torch.randn(7, 5, dtype=dtype), torch.arange(4)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_vectorized_jacobian(reduction: str, create_graph: bool) -> None:
    hidden, weight, target = make()

    def jacobian(loss: Any) -> Any:
        scaled = lambda *t: torch.stack([loss(*t).sum(), loss(*t).sum() * 2])  # noqa: E731
        return torch.autograd.functional.jacobian(
            scaled, (hidden, weight), vectorize=True, create_graph=create_graph
        )

    ours = jacobian(lambda h, w: ops.linear_cross_entropy(h, w, target, reduction=reduction))
    theirs = jacobian(lambda h, w: F.cross_entropy(h @ w.t(), target, reduction=reduction))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_batched_gradients_of_one_graph() -> None:
    """Twice: first from the gradients made in the forward pass, then without them."""
    hidden, weight, target = make()
    hidden.requires_grad_()
    loss = ops.linear_cross_entropy(hidden, weight, target)
    factors = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    (once,) = torch.autograd.grad(loss, hidden)
    for _ in range(2):
        loss = ops.linear_cross_entropy(hidden, weight, target)
        for _ in range(2):
            (rows,) = torch.autograd.grad(
                loss, hidden, factors, is_grads_batched=True, retain_graph=True
            )
            torch.testing.assert_close(rows, factors[:, None, None] * once)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_of_fakes(reduction: str) -> None:
    with FakeTensorMode():
        hidden, weight, target = make()
        hidden.requires_grad_()
        ops.linear_cross_entropy(hidden, weight, target, reduction=reduction).sum().backward()
        assert hidden.grad is not None
        assert hidden.grad.shape == (4, 5)


def test_vmap() -> None:
    """Nothing in it is random, so vmap need not be told what to do about it."""
    hidden, weight, target = make()
    losses = torch.func.vmap(lambda h, y: ops.linear_cross_entropy(h[None], weight, y[None]))(
        hidden, target
    )
    torch.testing.assert_close(
        losses, F.cross_entropy(hidden @ weight.t(), target, reduction="none")
    )


@pytest.mark.parametrize("of_bias", [torch.float32, torch.float64], ids=str)
def test_second_derivative_with_a_bias_of_another_dtype(backend: Any, of_bias: torch.dtype) -> None:
    dtype = torch.float64 if of_bias == torch.float32 else torch.float32
    hidden, weight, target = (t.to(backend.device) for t in make(dtype))
    bias = torch.randn(7, dtype=of_bias, device=backend.device)

    def second(loss: Any) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
        first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)  # type: ignore[arg-type]

    ours = second(lambda h, w, b: ops.linear_cross_entropy(h, w, target, b))
    theirs = second(lambda h, w, b: F.cross_entropy(h @ w.t() + b.to(h.dtype), target))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
