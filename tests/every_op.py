"""A case for every public op and module, with one size that may vary: what the sweeps run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import seqkern
from seqkern import nn, ops, reference


@dataclass(frozen=True)
class Case:
    """`call` on the tensors of `make(n)`; `sizes` says which dimensions of each are n.

    `plain` is the same of PyTorch's own operations, which every op with gradients has.
    """

    make: Callable[[int], list[Tensor]]
    sizes: list[dict[int, str]]
    call: Callable[..., Any]
    gradients: bool = True
    plain: Callable[..., Any] | None = None


def randn(*size: int) -> Tensor:
    return torch.randn(*size)


def classes(*size: int) -> Tensor:
    return torch.randint(0, 7, size)


def heads(n: int) -> list[Tensor]:
    return [randn(2, 4, n, 8), randn(2, 2, n, 8), randn(2, 2, n, 8)]


def gates(n: int) -> list[Tensor]:
    return [randn(n, 3, 5), randn(3, 4), randn(3, 4), randn(16, 5), randn(16, 4), randn(16)]


def block(C: int) -> list[Tensor]:
    """Parameters of a transformer block, in the order of `ops.decoder_step`."""
    weights = (randn(3 * C, C), randn(C, C), randn(4 * C, C), randn(C, 4 * C))
    qkv, out, up, down = ([w, randn(w.shape[0])] for w in weights)
    norm = [randn(C), randn(C)]
    return [*norm, *qkv, *out, *norm, *up, *down]


def step(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    k_cache, v_cache = cache.clone().unbind(0)
    return ops.attention_step(q, k, v, k_cache, v_cache, lengths)


def smoothed(x: Tensor, y: Tensor) -> Tensor:
    """The case of cross_entropy by PyTorch's own, whose z-loss there is none of."""
    return F.cross_entropy(x, y, label_smoothing=0.1) + 1e-3 * x.logsumexp(-1).square().mean()


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T = q.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    distance = torch.arange(T)[:, None] - torch.arange(T)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill((distance < 0) | (distance >= 3), -torch.inf).softmax(-1) @ v


N, T = "n", "n"
OPS = {
    "cross_entropy": Case(
        lambda n: [randn(n, 7), classes(n)],
        [{0: N}, {0: N}],
        lambda x, y: ops.cross_entropy(x, y, label_smoothing=0.1, z_loss=1e-3),
        plain=smoothed,
    ),
    "linear_cross_entropy": Case(
        lambda n: [randn(n, 5), randn(7, 5), classes(n), randn(7)],
        [{0: N}, {}, {0: N}, {}],
        ops.linear_cross_entropy,
        plain=lambda h, w, y, b: F.cross_entropy(F.linear(h, w, b), y),
    ),
    "causal_attention": Case(
        heads,
        [{2: T}] * 3,
        lambda q, k, v: ops.causal_attention(q, k, v, window=3),
        plain=windowed,
    ),
    "attention_step": Case(
        lambda n: [
            *(randn(n, heads, 1, 8) for heads in (4, 2, 2)),
            randn(2, n, 2, 6, 8),
            torch.randint(0, 5, (n,)),
        ],
        [{0: N}, {0: N}, {0: N}, {1: N}, {0: N}],
        step,
        gradients=False,
    ),
    "linear_step": Case(
        lambda n: [randn(n, 5), randn(6, 5), randn(6)],
        [{0: N}, {}, {}],
        lambda *tensors: ops.linear_step(*tensors, norm="rms_norm", activation="gelu"),
        gradients=False,
    ),
    "decoder_step": Case(
        lambda n: [randn(n, 1, 4), randn(1, 2, n, 2, 6, 2), torch.randint(0, 5, (n,)), *block(4)],
        [{0: N}, {2: N}, {0: N}, *[{}] * 12],
        lambda x, cache, lengths, *parameters: ops.decoder_step(
            x, parameters, cache.clone(), lengths
        ),
        gradients=False,
    ),
    "lstm": Case(
        gates,
        [{0: T}, {}, {}, {}, {}, {}],
        lambda x, h, c, *weights: ops.lstm(x, (h, c), *weights, weights[-1]),
        plain=lambda x, h, c, *weights: reference.lstm(x, h, c, *weights, weights[-1])[:3],
    ),
    "lstm_cell": Case(
        lambda n: [randn(n, 5), randn(n, 4), randn(n, 4), randn(16, 5), randn(16, 4)],
        [{0: N}, {0: N}, {0: N}, {}, {}],
        lambda x, h, c, *weights: ops.lstm_cell(x, (h, c), *weights),
        plain=lambda x, h, c, *weights: torch.lstm_cell(x, (h, c), *weights),
    ),
    "gru": Case(
        lambda n: [randn(n, 3, 5), randn(3, 4), randn(12, 5), randn(12, 4)],
        [{0: T}, {}, {}, {}],
        ops.gru,
        plain=reference.gru,
    ),
    "gru_cell": Case(
        lambda n: [randn(n, 5), randn(n, 4), randn(12, 5), randn(12, 4), randn(12), randn(12)],
        [{0: N}, {0: N}, {}, {}, {}, {}],
        ops.gru_cell,
        plain=torch.gru_cell,
    ),
    "rnn_cell": Case(
        lambda n: [randn(n, 5), randn(n, 4), randn(4, 5), randn(4, 4)],
        [{0: N}, {0: N}, {}, {}],
        ops.rnn_cell,
        plain=torch.rnn_tanh_cell,
    ),
    "rnn": Case(
        lambda n: [randn(n, 3, 5), randn(3, 4), randn(4, 5), randn(4, 4)],
        [{0: T}, {}, {}, {}],
        ops.rnn,
        plain=reference.rnn,
    ),
    "softmax": Case(
        lambda n: [randn(n, 9)],
        [{0: N}],
        lambda x: ops.softmax(x),
        plain=lambda x: x.softmax(-1),
    ),
    "log_softmax": Case(
        lambda n: [randn(3, n)],
        [{1: N}],
        lambda x: ops.log_softmax(x),
        plain=lambda x: x.log_softmax(-1),
    ),
    "sample": Case(
        lambda n: [randn(n, 33)],
        [{0: N}],
        lambda x: ops.sample(x, top_k=5, top_p=0.9, seed=3),
        gradients=False,
    ),
}
#: Not compiled: the backward of a rank waits for the others' (see its docstring).
NOT_COMPILED = {"vocab_parallel_linear_cross_entropy"}


def recurrent(n: int) -> list[Tensor]:
    return [randn(n, 3, 5)]


MODULES: dict[str, tuple[Callable[[], torch.nn.Module], Case]] = {
    name: (make, Case(inputs, sizes, lambda module, *tensors: module(*tensors)))
    for name, make, inputs, sizes in [
        ("LSTM", lambda: nn.LSTM(5, 4, 2, bidirectional=True), recurrent, [{0: T}]),
        ("GRU", lambda: nn.GRU(5, 4, 2), recurrent, [{0: T}]),
        ("RNN", lambda: nn.RNN(5, 4, 2), recurrent, [{0: T}]),
        ("LSTMCell", lambda: nn.LSTMCell(5, 4), lambda n: [randn(n, 5)], [{0: N}]),
        ("GRUCell", lambda: nn.GRUCell(5, 4), lambda n: [randn(n, 5)], [{0: N}]),
        ("RNNCell", lambda: nn.RNNCell(5, 4), lambda n: [randn(n, 5)], [{0: N}]),
        (
            "CrossEntropyLoss",
            lambda: nn.CrossEntropyLoss(torch.rand(7)),
            lambda n: [randn(n, 7), classes(n)],
            [{0: N}, {0: N}],
        ),
        (
            "LinearCrossEntropyLoss",
            lambda: nn.LinearCrossEntropyLoss(torch.rand(7)),
            lambda n: [randn(n, 5), randn(7, 5), classes(n)],
            [{0: N}, {}, {0: N}],
        ),
        (
            "CausalSelfAttention",
            lambda: nn.CausalSelfAttention(16, 4, 2),
            lambda n: [randn(2, n, 16)],
            [{1: T}],
        ),
    ]
}
NOT_MODULES = {"KVCache"}


class AsModule(torch.nn.Module):
    """An op as a module, which is what can be exported."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *tensors: Tensor) -> Any:
        return self.call(*tensors)


def build(name: str) -> tuple[torch.nn.Module, Case]:
    """A module for an op's or a module's case."""
    torch.manual_seed(0)
    if name in OPS:
        return AsModule(OPS[name].call), OPS[name]
    make, case = MODULES[name]
    return make(), case


def flat(result: Any) -> list[Tensor]:
    """The tensors of a nested result."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


def outcome(
    call: Callable[..., Any], module: Any, tensors: list[Tensor], gradients: bool = True
) -> list[Tensor]:
    """Results, and gradients by the inputs and the module's parameters."""
    inputs = [t.detach().requires_grad_(gradients and t.is_floating_point()) for t in tensors]
    results = flat(call(*inputs))
    wanted = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    differentiable = [r for r in results if r.requires_grad]
    if not differentiable:
        return results
    total = sum(r.float().square().sum() for r in differentiable)
    return [*results, *torch.autograd.grad(total, wanted)]  # type: ignore[arg-type]


__all__ = ["MODULES", "NOT_COMPILED", "NOT_MODULES", "OPS", "build", "flat", "outcome", "seqkern"]
