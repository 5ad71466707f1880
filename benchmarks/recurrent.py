"""What the benchmarks of the recurrent layers share: one layer over x [T, B, H]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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

CASES = (
    Case(B=16, T=128, H=256),
    Case(B=64, T=256, H=128),
    Case(B=32, T=128, H=512),
    Case(B=1, T=64, H=256),
)
_TORCHS: dict[str, Any] = {"gru": torch.gru, "rnn": torch.rnn_tanh}


def make_weights(
    gates: int, D: int, H: int, device: torch.device, rng: torch.Generator
) -> tuple[Tensor, ...]:
    """w_ih, w_hh, b_ih and b_hh of a layer of input width D, as torch draws them."""
    sizes = ((gates * H, D), (gates * H, H), (gates * H,), (gates * H,))
    return tuple(
        torch.rand(*size, generator=rng, device=device).mul_(2).sub_(1).mul_(H**-0.5)
        for size in sizes
    )


def make_layer(
    gates: int, case: Case, dtype: torch.dtype, device: torch.device, rng: torch.Generator
) -> Problem:
    """Input of standard deviation 1 and torch's default weights, uniform of 1 / sqrt(H)."""
    B, T, H = case["B"], case["T"], case["H"]
    x = torch.randn(T, B, H, generator=rng, device=device)
    weights = make_weights(gates, H, H, device, rng)
    upstream = torch.randn(T, B, H, generator=rng, device=device).to(dtype)
    args = tuple(t.to(dtype) for t in (x, *weights))
    return Problem(args, wrt=(0, 1, 2, 3, 4), upstream=(upstream,))


def load(module: torch.nn.Module, weights: tuple[Tensor, ...]) -> None:
    """Let a module's parameters be these tensors, which are those that get gradients."""
    parameters: dict[str, Any] = module._parameters
    for name, weight in zip(list(parameters), weights, strict=True):
        parameters[name] = weight


def benchmark(op: str, gates: int) -> Benchmark:
    """The benchmark of a layer whose state is h alone."""

    def make(case: Case, dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> Problem:
        return make_layer(gates, case, dtype, device, rng)

    def plain(x: Tensor, *weights: Tensor) -> Tensor:
        output: Tensor = getattr(need("seqkern.reference"), op)(x, None, *weights)[0]
        return output

    def torchs(problem: Problem) -> Forward:
        def forward(x: Tensor, *weights: Tensor) -> Tensor:
            zeros = x.new_zeros(1, x.shape[1], x.shape[2])
            options = (True, 1, 0.0, True, False, False)
            output: Tensor = _TORCHS[op](x, zeros, weights, *options)[0]
            return output

        return forward

    def seqkern(problem: Problem) -> Forward:
        ours: Any = getattr(need("seqkern.ops"), op)

        def forward(x: Tensor, *weights: Tensor) -> Tensor:
            output: Tensor = ours(x, None, *weights)[0]
            return output

        return forward

    def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
        """Two products of [T B, H] with [H, G H]; backward has four. Memory: x, gates, h once."""
        B, T, H = case["B"], case["T"], case["H"]
        products = 2 if mode == FORWARD else 6
        passes = 2 if mode == FORWARD else 3 * gates + 3
        flops = products * 2 * gates * T * B * H * H
        return Cost(bytes=passes * T * B * H * dtype.itemsize, flops=flops)

    return Benchmark(
        op=op,
        axes="B x T x H",
        cases=CASES,
        quick=(Case(B=1, T=16, H=64), Case(B=8, T=16, H=64)),
        cuda_cases=(Case(B=16, T=1024, H=768),),
        make=make,
        reference=by_autograd(plain),
        cost=cost,
        peers=(Peer("torch", torchs), Peer("seqkern", seqkern)),
        bound="flops",
    )
