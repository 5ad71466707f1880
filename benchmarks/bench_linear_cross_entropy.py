"""Loss of a language-model head, mean over N rows: hidden [N, H], weight [V, H], class targets."""

from __future__ import annotations

from typing import Any

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

CHUNK = 1 << 22  # float64 logits the reference holds at a time


def make(case: Case, dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> Problem:
    """Logits of standard deviation 2 and uniform targets."""
    N, H, V = case["N"], case["H"], case["V"]
    hidden = torch.randn(N, H, generator=rng, device=device).to(dtype)
    weight = torch.randn(V, H, generator=rng, device=device).mul_(2 * H**-0.5).to(dtype)
    target = torch.randint(V, (N,), generator=rng, device=device)
    # Half precision needs a scaled loss, as in training: p / N is below its smallest number.
    scale = torch.tensor(float(min(N, 32768)), device=device)
    upstream = (scale,) if dtype == torch.float16 else None
    return Problem((hidden, weight, target), wrt=(0, 1), upstream=upstream)


def reference(problem: Problem) -> Reference:
    """The definition in float64, some rows at a time."""
    hidden, weight, target = problem.args
    N, V = hidden.size(0), weight.size(0)
    scale = float(problem.upstream[0]) if problem.upstream else 1.0
    w64 = weight.double()
    dhidden = torch.empty_like(hidden, dtype=torch.float64)
    dweight = torch.zeros_like(w64)
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    rows = max(1, CHUNK // V)
    for first in range(0, N, rows):
        chunk = slice(first, first + rows)
        h64, t = hidden[chunk].double(), target[chunk, None]
        x = h64 @ w64.t()  # [rows, V]
        lse = x.logsumexp(1, keepdim=True)  # [rows, 1]
        loss += (lse - x.gather(1, t)).sum() / N
        x.sub_(lse).exp_().scatter_add_(1, t, torch.full_like(lse, -1)).mul_(scale / N)
        dhidden[chunk] = x @ w64
        dweight.addmm_(x.t(), h64)
    return Reference((loss,), (dhidden, dweight))


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """One GEMM, or three; each input read once and each gradient written once."""
    N, H, V = case["N"], case["H"], case["V"]
    gemms, passes = (1, 1) if mode == FORWARD else (3, 2)
    return Cost(bytes=passes * (N + V) * H * dtype.itemsize, flops=gemms * 2 * N * H * V)


def plain(problem: Problem) -> Forward:
    """The logits, and their loss."""
    return lambda hidden, weight, target: F.cross_entropy(F.linear(hidden, weight), target)


def seqkern(problem: Problem) -> Forward:
    """Our op."""
    forward: Forward = need("seqkern.ops").linear_cross_entropy
    return forward


def chunked(problem: Problem) -> Forward:
    """torch's op with its chunks, from 2.13 on."""
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise UnavailableError("torch has it from 2.13 on")
    function: Any = F.linear_cross_entropy  # type: ignore[attr-defined,unused-ignore]

    def forward(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = function(hidden, weight, target, options=options())
        return loss

    return forward


def liger(problem: Problem) -> Forward:
    """Liger's chunks around its Triton kernel."""
    if problem.args[0].device.type != "cuda":
        raise UnavailableError("runs on CUDA only")
    function: Any = need("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return lambda hidden, weight, target: function(hidden, weight, target)


BENCHMARK = Benchmark(
    op="linear_cross_entropy",
    axes="N x H x V",
    cases=(
        Case(N=2048, H=768, V=50257),
        Case(N=512, H=768, V=32000),
        Case(N=2048, H=256, V=8192),
        Case(N=4096, H=128, V=256),
        Case(N=1024, H=256, V=65),
        Case(N=64, H=64, V=128),
    ),
    quick=(Case(N=64, H=64, V=128), Case(N=256, H=64, V=1000)),
    cuda_cases=(Case(N=8192, H=4096, V=128256),),
    make=make,
    reference=reference,
    cost=cost,
    bound="flops",
    memory=True,
    peers=(
        Peer("torch", plain),
        Peer("seqkern", seqkern),
        Peer("torch chunked", chunked, optional=True, note="takes seconds a call on the CPU"),
        Peer("liger", liger),
    ),
)
