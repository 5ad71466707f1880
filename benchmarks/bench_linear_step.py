"""The linear layer of a decoding step: LayerNorm, product, GELU and residual of N rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.registry import (
    FORWARD,
    Benchmark,
    Case,
    Cost,
    Forward,
    Peer,
    Problem,
    Reference,
    need,
)


def make(case: Case, dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> Problem:
    """Standard normal rows; a weight that keeps their variance."""
    N, K, M = (case[letter] for letter in ("N", "K", "M"))

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=rng, device=device) * scale).to(dtype)

    norm = random(K), random(K)
    return Problem((random(N, K), random(M, K, scale=K**-0.5), random(M), *norm, random(N, M)), ())


def reference(problem: Problem) -> Reference:
    """In float64."""
    x, weight, bias, norm_weight, norm_bias, residual = (a.double() for a in problem.args)
    y = need("seqkern.reference").linear_step(
        x,
        weight,
        bias,
        norm="layer_norm",
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        activation="gelu",
        residual=residual,
    )
    return Reference((y,), ())


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """One read of the weight."""
    weight = case["M"] * case["K"]
    return Cost(bytes=weight * dtype.itemsize, flops=2 * case["N"] * weight)


def plain(problem: Problem) -> Forward:
    """PyTorch's operations, one after the other."""

    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        residual: Tensor,
    ) -> Tensor:
        z = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
        return residual + F.gelu(F.linear(z, weight, bias))

    return forward


def seqkern(problem: Problem) -> Forward:
    """Our op."""
    op = need("seqkern.ops").linear_step

    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        residual: Tensor,
    ) -> Tensor:
        y: Tensor = op(
            x,
            weight,
            bias,
            norm="layer_norm",
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            activation="gelu",
            residual=residual,
        )
        return y

    return forward


BENCHMARK = Benchmark(
    op="linear_step",
    axes="N x K x M",
    cases=(
        Case(N=1, K=768, M=2304),
        Case(N=1, K=3072, M=768),
        Case(N=1, K=768, M=50257),
        Case(N=1, K=128, M=512),
        Case(N=8, K=768, M=3072),
        Case(N=32, K=768, M=3072),
        Case(N=16, K=768, M=50257),
    ),
    quick=(Case(N=1, K=128, M=512), Case(N=3, K=50, M=70)),
    cuda_cases=(Case(N=1, K=4096, M=14336), Case(N=16, K=4096, M=14336)),
    make=make,
    reference=reference,
    cost=cost,
    modes=(FORWARD,),
    peers=(Peer("torch", plain), Peer("seqkern", seqkern)),
)
