"""Stacked and bidirectional LSTMs over x [T, B, H], as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.recurrent import load, make_weights
from benchmarks.registry import (
    FORWARD,
    Benchmark,
    Case,
    Cost,
    Forward,
    Peer,
    Problem,
    Reference,
    by_autograd,
    need,
)


def _widths(case: Case) -> list[int]:
    """Of the input of each recurrence: directions of layer 0, then of layer 1."""
    H, D = case["H"], case["D"]
    return [H if layer == 0 else D * H for layer in range(case["L"]) for _ in range(D)]


def make(case: Case, dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> Problem:
    """Input of standard deviation 1 and torch's default weights, uniform of 1 / sqrt(H)."""
    B, T, H = case["B"], case["T"], case["H"]
    x = torch.randn(T, B, H, generator=rng, device=device)
    weights = [w for width in _widths(case) for w in make_weights(4, width, H, device, rng)]
    upstream = torch.randn(T, B, case["D"] * H, generator=rng, device=device).to(dtype)
    args = tuple(t.to(dtype) for t in (x, *weights))
    return Problem(args, wrt=tuple(range(len(args))), upstream=(upstream,))


def _shape(problem: Problem) -> tuple[int, int]:
    """Layers and directions."""
    assert problem.upstream is not None
    H = problem.args[0].shape[2]
    D = problem.upstream[0].shape[2] // H
    return (len(problem.args) - 1) // (4 * D), D


def reference(problem: Problem) -> Reference:
    """The definition, layer by layer."""
    layers, D = _shape(problem)
    lstm: Any = need("seqkern.reference").lstm

    def plain(x: Tensor, *weights: Tensor) -> Tensor:
        for n in range(layers):
            first = 4 * D * n
            outputs = [
                lstm(x, None, None, *weights[first + 4 * d : first + 4 * d + 4], reverse=d == 1)[0]
                for d in range(D)
            ]
            x = torch.cat(outputs, -1)
        return x

    return by_autograd(plain)(problem)


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """Two products per recurrence; backward has four. Memory: input, gates, c and h once."""
    B, T, H = case["B"], case["T"], case["H"]
    products = 1 if mode == FORWARD else 3
    weights = sum(4 * H * (width + H) for width in _widths(case))
    passes = 2 if mode == FORWARD else 15
    numbers = passes * T * B * H * case["L"] * case["D"]
    return Cost(bytes=numbers * dtype.itemsize, flops=products * 2 * T * B * weights)


def torchs(problem: Problem) -> Forward:
    """Torch's own."""
    layers, D = _shape(problem)

    def forward(x: Tensor, *weights: Tensor) -> Tensor:
        zeros = x.new_zeros(layers * D, x.shape[1], x.shape[2])
        options = (True, layers, 0.0, True, D == 2, False)
        output: Tensor = torch.lstm(x, (zeros, zeros), weights, *options)[0]
        return output

    return forward


def seqkern(problem: Problem) -> Forward:
    """Our module."""
    layers, D = _shape(problem)
    H = problem.args[0].shape[2]
    module = need("seqkern.nn").LSTM(H, H, layers, bidirectional=D == 2)

    def forward(x: Tensor, *weights: Tensor) -> Tensor:
        load(module, weights)
        output: Tensor = module(x)[0]
        return output

    return forward


BENCHMARK = Benchmark(
    op="lstm_layers",
    axes="B x T x H x layers x directions",
    cases=(
        Case(B=16, T=128, H=256, L=2, D=1),
        Case(B=16, T=128, H=256, L=1, D=2),
        Case(B=32, T=64, H=128, L=2, D=2),
    ),
    quick=(Case(B=2, T=8, H=32, L=2, D=1), Case(B=3, T=8, H=32, L=2, D=2)),
    cuda_cases=(
        Case(B=16, T=1024, H=768, L=2, D=1),
        Case(B=16, T=1024, H=768, L=1, D=2),
        Case(B=64, T=1024, H=256, L=2, D=1),
    ),
    make=make,
    reference=reference,
    cost=cost,
    peers=(Peer("torch", torchs), Peer("seqkern", seqkern)),
    bound="flops",
)
