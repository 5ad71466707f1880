"""Softmax-cross-entropy of logits [B, V, T], whose classes lie T apart, as taggers and convolutions
make them; mean over the B * T rows.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks import bench_cross_entropy as rows
from benchmarks.registry import Benchmark, Case, Cost, Peer, Problem, Reference


def make(case: Case, dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> Problem:
    """Logits of standard deviation 2 and uniform targets."""
    B, V, T = case["B"], case["V"], case["T"]
    problem = rows.make(Case(N=B * T, V=V), dtype, device, rng)
    logits, target = problem.args
    logits = logits.view(B, T, V).movedim(-1, 1).contiguous()
    return Problem((logits, target.view(B, T)), upstream=problem.upstream)


def reference(problem: Problem) -> Reference:
    """That of the same rows one after the other."""
    logits, target = problem.args
    B, V, T = logits.shape
    flat = logits.movedim(1, -1).reshape(B * T, V)
    found = rows.reference(Problem((flat, target.reshape(-1)), upstream=problem.upstream))
    return Reference(found.outputs, (found.grads[0].view(B, T, V).movedim(-1, 1),))


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """As of rows one after the other."""
    return rows.cost(Case(N=case["B"] * case["T"], V=case["V"]), dtype, mode)


BENCHMARK = Benchmark(
    op="cross_entropy_columns",
    axes="B x V x T",
    cases=(
        Case(B=32, V=2, T=512),
        Case(B=32, V=5, T=512),
        Case(B=32, V=20, T=512),
        Case(B=64, V=50, T=128),
        Case(B=4, V=65, T=256),
        Case(B=8, V=1000, T=64),
        Case(B=8, V=5, T=65536),
        Case(B=2, V=21, T=65536),
    ),
    quick=(Case(B=2, V=3, T=40), Case(B=2, V=70, T=33)),
    cuda_cases=(
        Case(B=64, V=5, T=65536),
        Case(B=16, V=21, T=262144),
        Case(B=16, V=150, T=65536),
        Case(B=64, V=1000, T=1024),
        Case(B=8, V=32000, T=1024),
    ),
    make=make,
    reference=reference,
    cost=cost,
    peers=(
        Peer("torch", lambda problem: F.cross_entropy),
        Peer("seqkern", rows.seqkern),
        Peer("torch.compile", rows.compiled, optional=True),
    ),
)
