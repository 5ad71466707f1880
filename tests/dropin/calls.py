"""Calls made twice, by torch and by ours, and what they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import seqkern
from seqkern.dropin.counts import Counts, counting

ATTENTION = "torch.nn.functional.scaled_dot_product_attention"
CROSS_ENTROPY = "torch.nn.functional.cross_entropy"
LINEAR = "torch.nn.functional.linear_cross_entropy"
LSTM, CELL = "torch.nn.LSTM", "torch.nn.LSTMCell"


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result if part is not None for t in flat(part)]


def outcome(call: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """Results and gradients by the floating point tensors."""
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    results = flat(call(*inputs))
    wanted = [t for t in inputs if t.requires_grad]
    if not any(r.requires_grad for r in results):
        return results
    total = sum(r.double().square().sum() for r in results if r.requires_grad)
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    return [*results, *flat(grads)]


def both(call: Callable[..., Any], *tensors: Tensor) -> tuple[list[Tensor], list[Tensor], Counts]:
    """Ours and torch's outcome, and what was counted."""
    theirs = outcome(call, list(tensors))
    with counting() as counts, seqkern.accelerate():
        ours = outcome(call, list(tensors))
    return ours, theirs, counts


def randn(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, dtype=dtype)


CLASSES = torch.tensor([1, 2, -100, 4])
