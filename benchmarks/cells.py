"""What the benchmarks of one step share: a cell over x [B, H] with its products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.recurrent import make_weights
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

_TORCHS: dict[str, Any] = {
    "lstm_cell": torch.lstm_cell,
    "gru_cell": torch.gru_cell,
    "rnn_cell": torch.rnn_tanh_cell,
}


def benchmark(op: str, gates: int, states: int = 1) -> Benchmark:
    """The benchmark of an op of one step, whose result is h or, of two states, h and c."""

    def make(case: Case, dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> Problem:
        """Input and states of standard deviation 1 and torch's default weights."""
        B, H = case["B"], case["H"]
        rows = [torch.randn(B, H, generator=rng, device=device) for _ in range(states + 2)]
        weights = make_weights(gates, H, H, device, rng)
        args = tuple(t.to(dtype) for t in (*rows[:-1], *weights))
        return Problem(args, wrt=tuple(range(len(args))), upstream=(rows[-1].to(dtype),))

    def call(function: Any, tensors: tuple[Tensor, ...], *more: Any) -> Tensor:
        x, *others = tensors
        if states == 1:
            h: Tensor = function(x, *others, *more)
            return h
        result: tuple[Tensor, Tensor] = function(x, tuple(others[:states]), *others[states:], *more)
        return result[0]

    def plain(*tensors: Tensor) -> Tensor:
        return call(getattr(need("seqkern.reference"), op), tensors)

    def torchs(problem: Problem) -> Forward:
        return lambda *tensors: call(_TORCHS[op], tensors)

    def seqkern(problem: Problem) -> Forward:
        ours: Any = getattr(need("seqkern.ops"), op)
        return lambda *tensors: call(ours, tensors)

    def kept(problem: Problem) -> Forward:
        """Our op with weights that the module's `keep_packed` has packed before."""
        step: Any = need(f"seqkern.ops.{op}").step
        copy: Any = need("seqkern.ops._packed_weights").PackedWeights()

        def forward(*tensors: Tensor) -> Tensor:
            weights = tensors[1 + states :]
            packed = copy.of(weights[0], weights[1])
            return call(step, tensors[: 1 + states], weights, packed)

        return forward

    def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
        """Two products of [B, H] with [H, G H]; backward has four. Memory: each weight once, and in
        backward its gradient.
        """
        B, H = case["B"], case["H"]
        products = 2 if mode == FORWARD else 6
        passes = 1 if mode == FORWARD else 3
        return Cost(
            bytes=passes * 2 * gates * H * H * dtype.itemsize,
            flops=products * 2 * gates * B * H * H,
        )

    return Benchmark(
        op=op,
        axes="B x H",
        cases=(
            *(Case(B=16, H=256), Case(B=1, H=256), Case(B=64, H=256)),
            *(Case(B=128, H=512), Case(B=32, H=1024)),
        ),
        quick=(Case(B=2, H=16), Case(B=40, H=16)),
        make=make,
        reference=by_autograd(plain),
        cost=cost,
        peers=(Peer("torch", torchs), Peer("seqkern", seqkern), Peer("seqkern-kept", kept)),
        bound="flops",
    )
