"""A one-layer LSTM over x [T, B, H], input product included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.recurrent import CASES, make_layer
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
    """As `benchmarks.recurrent`."""
    return make_layer(4, case, dtype, device, rng)


def plain(x: Tensor, *weights: Tensor) -> Tensor:
    """The definition."""
    reference: Any = need("seqkern.reference")
    output: Tensor = reference.lstm(x, None, None, *weights)[0]
    return output


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """Two products of [T B, H] with [H, 4 H]; backward has four. Memory: x, gates, c and h once."""
    B, T, H = case["B"], case["T"], case["H"]
    products = 2 if mode == FORWARD else 6
    passes = 2 if mode == FORWARD else 15
    return Cost(bytes=passes * T * B * H * dtype.itemsize, flops=products * 8 * T * B * H * H)


def torchs(problem: Problem) -> Forward:
    """Torch's own."""

    def forward(x: Tensor, *weights: Tensor) -> Tensor:
        zeros = x.new_zeros(1, x.shape[1], x.shape[2])
        output: Tensor = torch.lstm(x, (zeros, zeros), weights, True, 1, 0.0, True, False, False)[0]
        return output

    return forward


def seqkern(problem: Problem) -> Forward:
    """Our op."""
    lstm: Any = need("seqkern.ops").lstm

    def forward(x: Tensor, *weights: Tensor) -> Tensor:
        output: Tensor = lstm(x, None, *weights)[0]
        return output

    return forward


BENCHMARK = Benchmark(
    op="lstm",
    axes="B x T x H",
    cases=CASES,
    quick=(Case(B=1, T=16, H=64), Case(B=8, T=16, H=64)),
    cuda_cases=(
        Case(B=16, T=1024, H=768),
        Case(B=1, T=1024, H=128),
        Case(B=16, T=1024, H=256),
        Case(B=17, T=1024, H=512),
        Case(B=64, T=1024, H=512),
        Case(B=128, T=1024, H=1024),
    ),
    make=make,
    reference=by_autograd(plain),
    cost=cost,
    peers=(Peer("torch", torchs), Peer("seqkern", seqkern)),
    bound="flops",
)
