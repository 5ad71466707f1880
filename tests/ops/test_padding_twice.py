"""Second derivatives beside padding and ignored rows that hold NaN, which no kernel reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seqkern import ops


def second(call: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients, and those of their squares."""
    first = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]  # type: ignore[arg-type]


def assert_not_read(
    call: Callable[..., Any],
    tensors: list[Tensor],
    absent: list[Tensor | None],
    other: float = torch.nan,
) -> None:
    """The same derivatives, zeros among them, with NaN (`other`) and with 0.5 where `absent` is."""
    results = []
    for filler in (other, 0.5):
        leaves = [
            (t if a is None else t.masked_fill(a, filler)).requires_grad_()
            for t, a in zip(tensors, absent, strict=True)
        ]
        results.append(second(call, leaves))
    for nan, number, a in zip(*results, [*absent, *absent], strict=True):
        assert torch.equal(nan, number)
        if a is not None:
            assert not nan.masked_select(a).any()


def randn(backend: Any, *size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, device=backend.device)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_recurrent(backend: Any, kind: str, reverse: bool) -> None:
    """Padding, the state of a row without steps, and the gradients that come back to padding."""
    T, D, H = 4, 3, 2
    lengths = torch.tensor([2, 4, 0], device=backend.device)
    states = 2 if kind == "lstm" else 1
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[kind]
    tensors = [randn(backend, T, 3, D), *(randn(backend, 3, H) for _ in range(states))]
    tensors += [randn(backend, gates * H, n) for n in (D, H)]
    beyond = (torch.arange(T, device=backend.device)[:, None] >= lengths)[..., None]
    absent = [beyond, *[(lengths == 0)[:, None]] * states, None, None]

    def call(x: Tensor, *others: Tensor) -> Tensor:
        *state, w_ih, w_hh = others
        before: Any = tuple(state) if kind == "lstm" else state[0]
        op = getattr(ops, kind)
        output, last = op(x, before, w_ih, w_hh, lengths=lengths, reverse=reverse)
        h_n = last[0] if kind == "lstm" else last
        return output.square().sum() + h_n[:2].square().sum()

    assert_not_read(call, tensors, absent)


@pytest.mark.parametrize("options", ["lengths", "cu_seqlens"])
def test_attention(backend: Any, options: str) -> None:
    q, k, v = (randn(backend, 1, 2, 5, 3) for _ in range(3))
    given: dict[str, Any] = {
        "lengths": {"lengths": torch.tensor([3], device=backend.device)},
        "cu_seqlens": {"cu_seqlens": torch.tensor([0, 2, 3], device=backend.device)},
    }[options]
    absent = torch.arange(5, device=backend.device)[:, None] >= 3

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = ops.causal_attention(q, k, v, **given, return_lse=True)
        return out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).square().sum()

    assert_not_read(call, [q, k, v], [absent] * 3)


LOSS_OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "none"},
    {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0},
]


@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
@pytest.mark.parametrize("linear", [False, True])
def test_losses(backend: Any, linear: bool, options: dict[str, Any]) -> None:
    target = torch.tensor([1, -100, 2], device=backend.device)
    ignored = (target == -100)[:, None]
    x, w, b = randn(backend, 3, 4), randn(backend, 5, 4), randn(backend, 5)
    if linear:
        assert_not_read(
            lambda x, w, b: ops.linear_cross_entropy(x, w, target, b, **options),
            [x, w, b],
            [ignored, None, None],
            # On CUDA the weight's gradient is a product of all rows, zeros for ignored ones: as
            # with PyTorch's own layer, 0 times NaN is NaN (docs/math/linear_cross_entropy.md).
            torch.nan if backend.name == "cpu" else 1e30,
        )
    else:
        assert_not_read(lambda x: ops.cross_entropy(x, target, **options), [x], [ignored])


@pytest.mark.parametrize("linear", [False, True])
def test_log_sum_exp_of_ignored_rows(backend: Any, linear: bool) -> None:
    """That has derivatives there as in any other row."""
    target = torch.tensor([1, -100, 2], device=backend.device)
    x, w = randn(backend, 3, 4).requires_grad_(), randn(backend, 5, 4).requires_grad_()

    def ours(x: Tensor, w: Tensor) -> Tensor:
        if linear:
            result: Any = ops.linear_cross_entropy(x, w, target, return_lse=True)
        else:
            result = ops.cross_entropy(x @ w.t(), target, return_lse=True)
        return result[0] + result[1].square().sum()

    def plain(x: Tensor, w: Tensor) -> Tensor:
        logits = x @ w.t()
        loss = torch.nn.functional.cross_entropy(logits, target)
        return loss + logits.logsumexp(-1).square().sum()

    for actual, expected in zip(second(ours, [x, w]), second(plain, [x, w]), strict=True):
        torch.testing.assert_close(actual, expected)
