"""One step of the LSTM."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqkern import reference
from seqkern.ops import _registry
from seqkern.ops._autocast import agreed
from seqkern.ops._fakes import check_shape
from seqkern.ops._mistakes import checked
from seqkern.ops._recurrent import (
    LSTM_CELL,
    differentiable,
    eager_function,
    needs,
    register_op,
    unpack,
)

State = tuple[Tensor, Tensor]


@checked("lstm_cell")
def lstm_cell(
    input: Tensor,
    state: State | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> State:
    """One step of an LSTM, as `lstm` defines it.

    Args:
        input: [B, I]; float32, float64, float16 or bfloat16, as all that follows.
        state: h [B, H] and c [B, H]; None for zeros.
        w_ih: [4 H, I], gates i, f, g, o one after the other.
        w_hh: [4 H, H].
        b_ih: [4 H].
        b_hh: [4 H].

    Returns:
        The next h and c.

    Raises:
        ValueError: a shape, dtype or device that does not fit.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html

    Example:
        >>> h, c = torch.zeros(3, 8), torch.zeros(3, 8)
        >>> w_ih, w_hh = torch.randn(32, 5), torch.randn(32, 8)
        >>> h, c = seqkern.ops.lstm_cell(torch.randn(3, 5), (h, c), w_ih, w_hh)
    """
    if state is None:
        zeros = input.new_zeros(*input.shape[:1], w_hh.shape[-1])
        state = (zeros, zeros)
    input, h, c, *weights = agreed(input, *state, w_ih, w_hh, b_ih, b_hh)
    return step(input, (h, c), tuple(weights))


def step(
    input: Tensor, state: State, weights: tuple[Any, ...], packed: Tensor | None = None
) -> State:
    """`lstm_cell` with what `PackedWeights.of` (ops/_packed_weights.py) has of its weights."""
    tensors = (input, *state, *weights)
    if torch.compiler.is_compiling():
        h, c, _ = _registry.active.lstm_cell(*tensors, True)
    elif _registry.is_transformed(*tensors):
        h, c = _plain(*tensors)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        h, c, _ = _registry.call(_LstmCell.apply, *tensors, packed, True)
    else:
        h, c, _ = _registry.call(_registry.active.lstm_cell_forward, *tensors, packed, False)
    return h, c


# ---------------------------------------------------------------- fakes


def _fake(
    input: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    (B, H), (w_hh, b_ih, b_hh), save_gates = h.shape, rest[:3], rest[-1]
    check_shape("lstm_cell", "input", input, (B, None))
    check_shape("lstm_cell", "c", c, (B, H))
    for name, t, shape in (
        ("w_ih", w_ih, (4 * H, input.shape[1])),
        ("w_hh", w_hh, (4 * H, H)),
        ("b_ih", b_ih, (4 * H,)),
        ("b_hh", b_hh, (4 * H,)),
    ):
        check_shape("lstm_cell", name, t, shape)
    gates = (input.shape[0], w_ih.shape[0]) if save_gates else (0,)
    return input.new_empty(h.shape), input.new_empty(c.shape), input.new_empty(gates)


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    input, h0, c0, w_ih, w_hh = args[2:7]
    wanted = args[-1] | 4
    shapes = (input.shape, h0.shape, c0.shape, w_ih.shape, w_hh.shape, w_ih.shape[:1])
    return tuple(input.new_empty(s if wanted & (1 << n) else (0,)) for n, s in enumerate(shapes))


# ---------------------------------------------------------------- gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    ctx.ops = _registry.active
    ctx.save_for_backward(*inputs[:7], outputs[1], outputs[2])
    ctx.mark_non_differentiable(outputs[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    *inputs, c1, gates = ctx.saved_tensors
    wanted = needs(ctx.needs_input_grad[:7])
    op = partial(ctx.ops.lstm_cell_backward, *grads[:2], *inputs[:5], c1, gates, wanted)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        found = differentiable(op, _plain, grads[:2], inputs, wanted, LSTM_CELL)
    else:
        found = op()
    return unpack(found, ctx.needs_input_grad, len(ctx.needs_input_grad))


_LstmCell = eager_function("lstm_cell_forward", _setup, _backward)


def _plain(input: Tensor, h: Tensor, c: Tensor, *weights: Any) -> State:
    return reference.lstm_cell(input, (h, c), *weights)


register_op("lstm_cell", _fake, _fake_backward, _setup, _backward)
