"""One step of an LSTM with input width H over x [B, H], products included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import (
    FORWARD,
    Benchmark,
    Case,
    Cost,
    Forward,
    Peer,
    Problem,
    by_autograd,
    need,
)


def make(case: Case, dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> Problem:
    """Input and state of standard deviation 1 and torch's default weights."""
    B, H = case["B"], case["H"]

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=rng, device=device).mul_(2).sub_(1).mul_(H**-0.5)

    rows = [torch.randn(B, H, generator=rng, device=device) for _ in range(4)]
    weights = (uniform(4 * H, H), uniform(4 * H, H), uniform(4 * H), uniform(4 * H))
    args = tuple(t.to(dtype) for t in (*rows[:3], *weights))
    return Problem(args, wrt=(0, 1, 2, 3, 4, 5, 6), upstream=(rows[3].to(dtype),))


def plain(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Tensor:
    """The definition."""
    reference: Any = need("seqkern.reference")
    output: Tensor = reference.lstm_cell(x, (h, c), *weights)[0]
    return output


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """Two products of [B, H] with [H, 4 H]; backward has four. Memory: each weight once, and in
    backward its gradient.
    """
    B, H = case["B"], case["H"]
    products = 2 if mode == FORWARD else 6
    passes = 1 if mode == FORWARD else 3
    return Cost(bytes=passes * 8 * H * H * dtype.itemsize, flops=products * 8 * B * H * H)


def torchs(problem: Problem) -> Forward:
    """Torch's own."""

    def forward(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Tensor:
        output: Tensor = torch.lstm_cell(x, (h, c), *weights)[0]
        return output

    return forward


def seqkern(problem: Problem) -> Forward:
    """Our op."""
    lstm_cell: Any = need("seqkern.ops").lstm_cell

    def forward(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Tensor:
        output: Tensor = lstm_cell(x, (h, c), *weights)[0]
        return output

    return forward


def kept(problem: Problem) -> Forward:
    """Our op with weights that `nn.LSTMCell.keep_packed` has packed before."""
    cell: Any = need("seqkern.ops.lstm_cell")
    copy = cell.PackedWeights()

    def forward(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Tensor:
        output: Tensor = cell.step(x, (h, c), weights, copy.of(weights[0], weights[1]))[0]
        return output

    return forward


BENCHMARK = Benchmark(
    op="lstm_cell",
    axes="B x H",
    cases=(Case(B=16, H=256), Case(B=1, H=256), Case(B=64, H=256), Case(B=128, H=512)),
    quick=(Case(B=2, H=16), Case(B=40, H=16)),
    make=make,
    reference=by_autograd(plain),
    cost=cost,
    peers=(Peer("torch", torchs), Peer("seqkern", seqkern), Peer("seqkern-kept", kept)),
    bound="flops",
)
