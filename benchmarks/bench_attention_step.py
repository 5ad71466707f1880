"""A decoding step of attention: B rows append a token to a cache of L keys and attend over it."""

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
    """Standard normal queries, keys and values; all rows but the last token's are in the cache."""
    B, NH, NKV, L, D = (case[letter] for letter in ("B", "NH", "NKV", "L", "D"))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device).to(dtype)

    caches = random(B, NKV, L, D), random(B, NKV, L, D)
    new = random(B, NKV, 1, D), random(B, NKV, 1, D)
    return Problem((random(B, NH, 1, D), *new, *caches, torch.full((B,), L - 1, device=device)), ())


def reference(problem: Problem) -> Reference:
    """Softmax attention in float64, on copies of the caches."""
    args = [a.double() if a.is_floating_point() else a for a in problem.args]
    return Reference((need("seqkern.reference").attention_step(*args),), ())


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """One read of the cache; two products."""
    keys = case["B"] * case["L"] * case["D"]
    return Cost(bytes=2 * case["NKV"] * keys * dtype.itemsize, flops=4 * case["NH"] * keys)


def plain(problem: Problem) -> Forward:
    """A write to a static cache and PyTorch's attention over all of it."""

    def forward(
        q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor
    ) -> Tensor:
        k_cache[:, :, -1:] = k
        v_cache[:, :, -1:] = v
        return F.scaled_dot_product_attention(q, k_cache, v_cache, enable_gqa=True)

    return forward


def seqkern(problem: Problem) -> Forward:
    """Our op."""
    forward: Forward = need("seqkern.ops").attention_step
    return forward


BENCHMARK = Benchmark(
    op="attention_step",
    axes="B x NH x NKV x L x D",
    cases=(
        Case(B=1, NH=32, NKV=8, L=4096, D=128),
        Case(B=1, NH=12, NKV=12, L=1024, D=64),
        Case(B=8, NH=12, NKV=12, L=1024, D=64),
        Case(B=16, NH=32, NKV=8, L=2048, D=128),
        Case(B=1, NH=4, NKV=4, L=64, D=32),
    ),
    quick=(Case(B=1, NH=4, NKV=4, L=64, D=32), Case(B=2, NH=4, NKV=2, L=700, D=40)),
    cuda_cases=(Case(B=64, NH=64, NKV=8, L=8192, D=128),),
    make=make,
    reference=reference,
    cost=cost,
    modes=(FORWARD,),
    peers=(Peer("torch", plain), Peer("seqkern", seqkern)),
)
