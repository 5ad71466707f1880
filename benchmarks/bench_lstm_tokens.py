"""A one-layer LSTM over tokens [T, B] of an embedding [V, H], as a language model's first layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import bench_lstm
from benchmarks.recurrent import load
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
    """Uniform tokens, an embedding of standard deviation 1, weights as `benchmarks.recurrent`."""
    layer = bench_lstm.make(case, dtype, device, rng)
    V, H = case["V"], case["H"]
    tokens = torch.randint(V, (case["T"], case["B"]), generator=rng, device=device)
    embedding = torch.randn(V, H, generator=rng, device=device).to(dtype)
    args = (tokens, embedding, *layer.args[1:])
    return Problem(args, wrt=(1, 2, 3, 4, 5), upstream=layer.upstream)


def plain(tokens: Tensor, embedding: Tensor, *weights: Tensor) -> Tensor:
    """The definition."""
    return bench_lstm.plain(F.embedding(tokens, embedding), *weights)


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """The product with the state [T B, H] and that of the embedding [V, H], each with [H, 4 H];
    backward has twice as many. Memory: gates, c and h once.
    """
    B, T, H, V = case["B"], case["T"], case["H"], case["V"]
    products = 1 if mode == FORWARD else 3
    passes = 1 if mode == FORWARD else 9
    rows = T * B + min(V, T * B)
    return Cost(bytes=passes * T * B * H * dtype.itemsize, flops=products * 8 * rows * H * H)


def torchs(problem: Problem) -> Forward:
    """Torch's own two."""
    layer: Any = bench_lstm.torchs(problem)

    def forward(tokens: Tensor, embedding: Tensor, *weights: Tensor) -> Tensor:
        output: Tensor = layer(F.embedding(tokens, embedding), *weights)
        return output

    return forward


def rows(problem: Problem) -> Forward:
    """Our module after torch's lookup."""
    return _module(problem, lambda lstm, tokens, table: lstm(F.embedding(tokens, table)))


def seqkern(problem: Problem) -> Forward:
    """Our module, with the embedding."""
    return _module(problem, lambda lstm, tokens, table: lstm(tokens, embedding=table))


def _module(problem: Problem, call: Any) -> Forward:
    H = problem.args[1].shape[1]
    module = need("seqkern.nn").LSTM(H, H)

    def forward(tokens: Tensor, embedding: Tensor, *weights: Tensor) -> Tensor:
        load(module, weights)
        output: Tensor = call(module, tokens, embedding)[0]
        return output

    return forward


BENCHMARK = Benchmark(
    op="lstm_tokens",
    axes="B x T x H x V",
    cases=(
        Case(B=16, T=128, H=256, V=96),
        Case(B=64, T=256, H=128, V=96),
        Case(B=32, T=128, H=512, V=1024),
        Case(B=16, T=128, H=256, V=8192),
    ),
    quick=(Case(B=8, T=16, H=64, V=20), Case(B=2, T=8, H=64, V=50)),
    cuda_cases=(Case(B=16, T=1024, H=768, V=256),),
    make=make,
    reference=by_autograd(plain),
    cost=cost,
    peers=(Peer("torch", torchs), Peer("seqkern", seqkern), Peer("seqkern-rows", rows)),
    bound="flops",
)
