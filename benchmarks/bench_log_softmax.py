"""Log-softmax over the last dimension of [N, V]."""

from __future__ import annotations

import torch

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


def make(case: Case, dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> Problem:
    """Rows of standard deviation 2, and upstream gradients of 1."""
    size = (case["N"], case["V"])
    x = torch.randn(size, generator=rng, device=device).mul_(2).to(dtype)
    dy = torch.randn(size, generator=rng, device=device).to(dtype)
    return Problem((x,), upstream=(dy,))


def reference(problem: Problem) -> Reference:
    """In float64."""
    return by_autograd(torchs(problem))(problem)


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """A read and a write; with the backward two reads and a write more. An exp counts as one."""
    elements = case["N"] * case["V"]
    passes, operations = (2, 3) if mode == FORWARD else (5, 7)
    return Cost(bytes=passes * elements * dtype.itemsize, flops=operations * elements)


def torchs(problem: Problem) -> Forward:
    """PyTorch's."""
    return lambda x: torch.log_softmax(x, -1)


def seqkern(problem: Problem) -> Forward:
    """Our op."""
    forward: Forward = need("seqkern.ops").log_softmax
    return forward


BENCHMARK = Benchmark(
    op="log_softmax",
    axes="N x V",
    cases=(
        Case(N=2048, V=50257),
        Case(N=4096, V=8000),
        Case(N=16384, V=512),
        Case(N=4096, V=256),
        Case(N=256, V=1000),
        Case(N=64, V=128),
    ),
    quick=(Case(N=64, V=128), Case(N=256, V=1000)),
    make=make,
    reference=reference,
    cost=cost,
    peers=(
        Peer("torch", lambda problem: lambda x: torch.log_softmax(x, -1)),
        Peer("seqkern", seqkern),
    ),
)
