"""Cases and helpers that the tests of cross_entropy share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqkern import reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Around a vector of rows of any width, four of them, and the most classes of rows read so.
SHAPES = [
    (1, 1),
    (1, 16),
    (3, 2),
    (5, 31),
    (4, 257),
    (2, 1031),
    (9, 50),
    (64, 2),
    (70, 12),
    (37, 24),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing-weight": {"label_smoothing": 0.3, "weight": True},
    "smoothing-none-weight": {"label_smoothing": 0.3, "weight": True, "reduction": "none"},
}
OURS_ONLY: dict[str, dict[str, Any]] = {
    "z_loss": {"z_loss": 1e-2},
    "z_loss-none": {"z_loss": 1e-2, "reduction": "none"},
    "z_loss-weight": {"z_loss": 1e-2, "weight": True},
    "softcap": {"softcap": 3.0},
    "all": {"softcap": 2.0, "z_loss": 1e-2, "weight": True, "label_smoothing": 0.1},
}


def make(
    N: int, V: int, dtype: torch.dtype, device: str, *, ignore: bool = True
) -> tuple[Tensor, Tensor]:
    """Logits of a plausible spread and targets, every third row ignored."""
    logits = (3 * torch.randn(N, V)).to(device=device, dtype=dtype)
    target = torch.randint(0, V, (N,))
    if ignore and N > 1:
        target[::3] = -100
        target[-1] = V - 1
    return logits, target.to(device)


def class_weight(V: int, device: str) -> Tensor:
    return (torch.rand(V) + 0.5).to(device)


def resolve(options: dict[str, Any], V: int, device: str) -> dict[str, Any]:
    return {k: class_weight(V, device) if k == "weight" else v for k, v in options.items()}


def cast_weight(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if k == "weight" else v for k, v in options.items()}


def run(function: Any, logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient under a fixed, uneven incoming gradient."""
    x = logits.detach().clone().requires_grad_()
    loss = function(x, target, **options)
    upstream = torch.linspace(0.5, 1.5, max(loss.numel(), 1), device=loss.device)
    loss.backward(upstream.reshape(loss.shape).to(loss.dtype))
    assert x.grad is not None
    return loss.detach(), x.grad


def exact(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    target = target.double() if target.is_floating_point() else target
    return run(
        lambda x, t, **o: reference.cross_entropy(x, t, **o)[0], logits.double(), target, **options
    )
