"""What the tests of the recurrent ops share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from accuracy import assert_accurate

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
#: T, B, input width D, H
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (33, 3, 4, 7), (5, 17, 3, 40), (2, 1, 40, 96), (3, 2, 9, 257)]
#: The same kinds for the emulator, at a fraction of the work.
TINY_SHAPES = [
    *((1, 1, 1, 1), (2, 3, 5, 7), (9, 3, 4, 7)),
    *((2, 9, 3, 13), (2, 1, 10, 24), (2, 2, 9, 37)),
]

Run = Callable[..., Sequence[Tensor]]


def run(function: Run, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Outputs of `function(*tensors)`, then the gradients of the floating ones under fixed, uneven
    upstream gradients."""
    leaves = [
        t.detach().clone().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in tensors
    ]
    outputs = function(*leaves)
    upstream = [
        torch.linspace(0.5, 1.5, o.numel(), device=o.device).reshape(o.shape).to(o.dtype)
        for o in outputs
    ]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    grads = torch.autograd.grad(outputs, wanted, upstream, allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]
    return [*(o.detach() for o in outputs), *zeros]


def compare(
    ours: Run, theirs: Run, exact: Run, make: Callable[[], Sequence[Tensor | None]]
) -> None:
    """The accuracy rule on all outputs and all gradients, over several draws where one has so few
    numbers that which of two errors is larger would be chance."""
    draws = [make() for _ in range(4 if make()[0].numel() > 16 else 16)]  # type: ignore[union-attr]
    dtype = next(t.dtype for t in draws[0] if t is not None and t.is_floating_point())
    results: list[list[tuple[Tensor, ...]]] = []
    for tensors in draws:
        double = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
        found = run(ours, tensors), run(theirs, tensors), run(exact, double)
        results.append(list(zip(*found, strict=True)))
    for drawn in zip(*results, strict=True):
        actual, torchs, truth = (torch.cat(same) for same in zip(*drawn, strict=True))
        assert actual.dtype == dtype
        assert_accurate(actual, torchs.to(dtype), truth, dtype)


def weights(
    gates: int, D: int, H: int, dtype: torch.dtype, device: str, P: int = 0, *, bias: bool = True
) -> list[Tensor | None]:
    """w_ih, w_hh, b_ih, b_hh and w_hr (None without a projection) of a layer."""
    make: Any = lambda *size: ((2 * torch.rand(*size) - 1) / H**0.5).to(device, dtype)  # noqa: E731
    b_ih, b_hh = (make(gates * H), make(gates * H)) if bias else (None, None)
    return [make(gates * H, D), make(gates * H, P or H), b_ih, b_hh, make(P, H) if P else None]


def some_lengths(B: int, T: int, device: str) -> Tensor:
    """Lengths in no order, T and 1 among them."""
    lengths = torch.randint(1, T + 1, (B,))
    lengths[-1] = T
    if B > 1:
        lengths[0] = 1
    return lengths.to(device)


def flip(x: Tensor, lengths: Tensor) -> Tensor:
    """Every row of [T, B, ...] reversed within its length."""
    times = torch.arange(x.shape[0], device=x.device).unsqueeze(-1)  # [T, 1]
    source = torch.where(times < lengths, lengths - 1 - times, times)  # [T, B]
    return x.gather(0, source.unsqueeze(-1).expand_as(x))
