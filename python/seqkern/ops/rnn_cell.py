"""One step of the RNN."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqkern import reference
from seqkern.ops import _registry
from seqkern.ops._autocast import agreed
from seqkern.ops._mistakes import checked
from seqkern.ops._recurrent import (
    RNN,
    differentiable,
    eager_function,
    fake_cell,
    fake_hidden_cell_backward,
    needs,
    register_op,
    unpack,
)


@checked("rnn_cell")
def rnn_cell(
    input: Tensor,
    h: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of an Elman RNN, as `rnn` defines it.

    Args:
        input: [B, I]; float32, float64, float16 or bfloat16, as all that follows.
        h: [B, H], the state; None for zeros.
        w_ih: [H, I].
        w_hh: [H, H].
        b_ih: [H].
        b_hh: [H].
        nonlinearity: "tanh" or "relu".

    Returns:
        The next h [B, H].

    Raises:
        ValueError: a shape, dtype or device that does not fit, or another nonlinearity.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html

    Example:
        >>> w_ih, w_hh = torch.randn(8, 5), torch.randn(8, 8)
        >>> h = seqkern.ops.rnn_cell(torch.randn(3, 5), torch.zeros(3, 8), w_ih, w_hh)
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn_cell: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    if h is None:
        h = input.new_zeros(*input.shape[:1], w_hh.shape[-1])
    input, h, *weights = agreed(input, h, w_ih, w_hh, b_ih, b_hh)
    return step(input, h, tuple(weights), relu=nonlinearity == "relu")


def step(
    input: Tensor,
    h: Tensor,
    weights: tuple[Any, ...],
    packed: Tensor | None = None,
    *,
    relu: bool = False,
) -> Tensor:
    """`rnn_cell` with what `PackedWeights.of` (ops/_packed_weights.py) has of its weights."""
    tensors = (input, h, *weights)
    result: Tensor
    if torch.compiler.is_compiling():
        result = _registry.active.rnn_cell(*tensors, relu)
    elif _registry.is_transformed(*tensors):
        (result,) = _plain(*tensors, nonlinearity="relu" if relu else "tanh")
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        result = _registry.call(_RnnCell.apply, *tensors, packed, relu)
    else:
        result = _registry.call(_registry.active.rnn_cell_forward, *tensors, packed, relu)
    return result


# ---------------------------------------------------------------- fakes


def _fake(*args: Any) -> Tensor:
    return fake_cell("rnn_cell", 1, args)[1]


# ---------------------------------------------------------------- gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.ops = _registry.active
    ctx.relu = inputs[-1]
    ctx.save_for_backward(*inputs[:6], output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Any) -> tuple[Tensor | None, ...]:
    *inputs, h = ctx.saved_tensors
    wanted = needs(ctx.needs_input_grad[:6], RNN)
    op = partial(ctx.ops.rnn_cell_backward, grad, *inputs[:4], h, ctx.relu, wanted)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        plain = partial(_plain, nonlinearity="relu" if ctx.relu else "tanh")
        found = differentiable(op, plain, (grad,), inputs, wanted, RNN)
    else:
        found = op()
    return unpack(found, ctx.needs_input_grad, len(ctx.needs_input_grad), RNN)


_RnnCell = eager_function("rnn_cell_forward", _setup, _backward)


def _plain(*inputs: Any, nonlinearity: str) -> tuple[Tensor]:
    input, h, w_ih, w_hh, b_ih, b_hh = inputs
    return (reference.rnn_cell(input, h, w_ih, w_hh, b_ih, b_hh, nonlinearity),)


register_op("rnn_cell", _fake, fake_hidden_cell_backward(RNN), _setup, _backward)
