"""Softmax-cross-entropy of logits [N, V] with class-index targets [N], mean over the rows."""

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
    UnavailableError,
    need,
)

CHUNK = 1 << 20  # float64 elements the reference holds at a time, beside the gradient


def make(case: Case, dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> Problem:
    """Logits of standard deviation 2 and uniform targets."""
    N, V = case["N"], case["V"]
    logits = torch.randn(N, V, generator=rng, device=device).mul_(2).to(dtype)
    target = torch.randint(V, (N,), generator=rng, device=device)
    # Half precision needs a scaled loss, as in training: p / N is below its smallest number.
    scale = torch.tensor(float(min(N, 32768)), device=device)
    return Problem((logits, target), upstream=(scale,) if dtype == torch.float16 else None)


def reference(problem: Problem) -> Reference:
    """Mean of lse(x_n) - x_n[t_n], and its gradient (softmax(x_n) - onehot(t_n)) / N."""
    logits, target = problem.args
    N = logits.size(0)
    scale = problem.upstream[0].double() if problem.upstream else 1.0
    grad = torch.empty_like(logits, dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64, device=logits.device)
    rows = max(1, CHUNK // logits.size(1))
    for first in range(0, logits.size(0), rows):
        chunk = slice(first, first + rows)
        t, dx = target[chunk], grad[chunk]
        x64 = logits[chunk].double()  # [rows, V]
        lse = x64.logsumexp(1, keepdim=True)  # [rows, 1]
        loss += (lse - x64.gather(1, t[:, None])).sum() / N
        torch.sub(x64, lse, out=dx).exp_()
        dx.scatter_add_(1, t[:, None], torch.full_like(lse, -1))
        dx.mul_(scale / N)
    return Reference((loss,), (grad,))


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """One read of the logits; with the backward two reads and one write. An exp counts as one."""
    elements = case["N"] * case["V"]
    passes, operations = (1, 3) if mode == FORWARD else (3, 6)
    return Cost(bytes=passes * elements * dtype.itemsize, flops=operations * elements)


def seqkern(problem: Problem) -> Forward:
    """Our op."""
    forward: Forward = need("seqkern.ops").cross_entropy
    return forward


def compiled(problem: Problem) -> Forward:
    """Torch's op through inductor, which fuses it; compiled for this shape alone."""
    torch.compiler.reset()  # else the shapes before count towards the limit of recompilations

    def forward(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target)

    result: Forward = torch.compile(forward, dynamic=False, fullgraph=True)
    return result


def liger(problem: Problem) -> Forward:
    """Liger's Triton kernel."""
    if problem.args[0].device.type != "cuda":
        raise UnavailableError("runs on CUDA only")
    forward: Forward = need("liger_kernel.transformers.functional").liger_cross_entropy
    return forward


BENCHMARK = Benchmark(
    op="cross_entropy",
    axes="N x V",
    cases=(
        Case(N=2048, V=50257),
        Case(N=4096, V=32064),
        Case(N=16384, V=512),
        Case(N=512, V=128256),
        Case(N=65536, V=16),
        Case(N=4096, V=256),
        Case(N=1024, V=65),
        Case(N=256, V=1000),
        Case(N=64, V=128),
        Case(N=16, V=16),
        Case(N=1, V=50257),
        Case(N=1, V=512),
        Case(N=1, V=16),
    ),
    quick=(Case(N=1, V=16), Case(N=64, V=128), Case(N=256, V=1000), Case(N=64, V=5025)),
    cuda_cases=(
        Case(N=8192, V=4096),
        Case(N=8192, V=32000),
        Case(N=8192, V=50257),
        Case(N=8192, V=128256),
        Case(N=2048, V=262144),
    ),
    make=make,
    reference=reference,
    cost=cost,
    peers=(
        Peer("torch", lambda problem: F.cross_entropy),
        Peer("seqkern", seqkern),
        Peer("torch.compile", compiled, optional=True),
        Peer(
            "liger",
            liger,
            overwrites=True,
            note="writes the gradient over the logits in its forward, so after its first call it "
            "works on those",
        ),
    ),
)
