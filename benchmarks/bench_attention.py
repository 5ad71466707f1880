"""Causal attention of q [B, NH, T, D], k and v [B, NKV, T, D], with a sliding window where W > 0.

Tensors lie in memory as the projections of a layer leave them, [B, T, heads, D].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def make(case: Case, dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> Problem:
    """Normal q, k, v and upstream gradient; the window travels as a fourth argument."""

    def normal(heads: int) -> Tensor:
        x = torch.randn(case["B"], case["T"], heads, case["D"], generator=rng, device=device)
        return x.to(dtype).transpose(1, 2)  # [B, heads, T, D]

    q, k, v = normal(case["NH"]), normal(case["NKV"]), normal(case["NKV"])
    window = torch.tensor(case["W"], device=device)
    return Problem((q, k, v, window), wrt=(0, 1, 2), upstream=(normal(case["NH"]),))


def reference(problem: Problem) -> Reference:
    """Head by head, since all scores at once would not fit."""
    q, k, v, window = (a.double() for a in problem.args)
    upstream = problem.upstream[0].double() if problem.upstream else torch.ones_like(q)
    group = q.shape[1] // k.shape[1]
    mask = visible(q.shape[2], int(window), q.device)
    out = torch.empty_like(q)
    grads = [torch.zeros_like(t) for t in (q, k, v)]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kv = h // group
            leaves = [t.detach().requires_grad_() for t in (q[b, h], k[b, kv], v[b, kv])]
            scores = (leaves[0] @ leaves[1].T) * q.shape[-1] ** -0.5  # [T, T]
            head = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ leaves[2]
            dq, dk, dv = torch.autograd.grad(head, leaves, upstream[b, h])
            out[b, h] = head.detach()
            grads[0][b, h] = dq
            grads[1][b, kv] += dk
            grads[2][b, kv] += dv
    return Reference((out,), tuple(grads))


def visible(T: int, window: int, device: torch.device) -> Tensor:
    """Bool [T, T]: which keys a query sees."""
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return causal.triu(1 - window) if window else causal


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """Two products over the visible scores; with the backward five more, of which one repeats."""
    B, NH, NKV, T, D, W = (case[letter] for letter in ("B", "NH", "NKV", "T", "D", "W"))
    W = min(W or T, T)
    scores = B * NH * (W * (W + 1) // 2 + (T - W) * W)
    products, passes = (2, 1) if mode == FORWARD else (7, 3)
    elements = B * T * D * 2 * (NH + NKV)
    return Cost(bytes=passes * elements * dtype.itemsize, flops=2 * products * scores * D)


def torchs(problem: Problem) -> Forward:
    """Torch's own: is_causal, or the window's mask written out."""
    q, k, _, window = problem.args
    mask = visible(q.shape[2], int(window), q.device) if int(window) else None
    grouped = q.shape[1] != k.shape[1]

    def forward(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )

    return forward


def on_backend(name: str) -> Callable[[Problem], Forward]:
    """Torch's own on one of its CUDA backends."""

    def build(problem: Problem) -> Forward:
        if problem.args[0].device.type != "cuda":
            raise UnavailableError("runs on CUDA only")
        if int(problem.args[3]):
            raise UnavailableError("has no window")
        forward, backend = torchs(problem), getattr(SDPBackend, name)

        def chosen(*args: Tensor) -> Tensor | tuple[Tensor, ...]:
            with sdpa_kernel(backend):
                return forward(*args)

        return chosen

    return build


def seqkern(problem: Problem) -> Forward:
    """Our op."""
    attention = need("seqkern.ops").causal_attention
    window = int(problem.args[3]) or None

    def forward(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        out: Tensor = attention(q, k, v, window=window)
        return out

    return forward


def compiled(problem: Problem) -> Forward:
    """The same through inductor, compiled for this shape alone."""
    torch.compiler.reset()
    result: Forward = torch.compile(torchs(problem), dynamic=False, fullgraph=True)
    return result


def case(B: int, NH: int, NKV: int, T: int, D: int, W: int = 0) -> Case:
    return Case(B=B, NH=NH, NKV=NKV, T=T, D=D, W=W)


LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)

BENCHMARK = Benchmark(
    op="attention",
    axes="B x NH x NKV x T x D x W",
    cases=(
        case(4, 8, 8, 256, 64),
        case(2, 12, 12, 1024, 64),
        case(1, 16, 16, 2048, 128),
        case(2, 12, 12, 1024, 64, 128),
        case(2, 16, 2, 1024, 64),
        case(12, 4, 4, 64, 32),
        case(1, 1, 1, 4096, 64),
        case(8, 8, 8, 129, 80),
    ),
    quick=(case(1, 2, 2, 64, 32), case(1, 4, 1, 129, 40), case(1, 2, 2, 200, 64, 32)),
    cuda_cases=(
        *(case(16384 // T, 2048 // D, 2048 // D, T, D) for D in (64, 128) for T in LENGTHS),
        case(2, 64, 8, 4096, 128),
        case(4, 32, 32, 4096, 64, 128),
        case(4, 16, 16, 4096, 128, 128),
    ),
    make=make,
    reference=reference,
    cost=cost,
    bound="flops",
    peers=(
        Peer("torch", torchs, note="scaled_dot_product_attention; windows as an explicit mask"),
        Peer("seqkern", seqkern),
        Peer("torch.compile", compiled, optional=True),
        Peer("flash", on_backend("FLASH_ATTENTION"), note="torch's FlashAttention-2 backend"),
        Peer("cudnn", on_backend("CUDNN_ATTENTION"), note="torch's cuDNN backend"),
    ),
)
