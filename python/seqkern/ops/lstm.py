"""The LSTM: one direction of one layer over a whole sequence."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from seqkern import reference
from seqkern.ops import _registry
from seqkern.ops._autocast import agreed
from seqkern.ops._fakes import check_shape
from seqkern.ops._mistakes import checked
from seqkern.ops._recurrent import (
    check_layer,
    differentiable,
    eager_function,
    fake_gradients,
    needs,
    register_op,
    rows_read,
    states_before,
    unpack,
)
from seqkern.reference.inputs import input_product

State = tuple[Tensor, Tensor]


@overload
def lstm(
    input: Tensor,
    state: State | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    recompute: bool = False,
    return_cells: Literal[False] = False,
) -> tuple[Tensor, State]: ...


@overload
def lstm(
    input: Tensor,
    state: State | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    recompute: bool = False,
    return_cells: Literal[True],
) -> tuple[Tensor, State, Tensor]: ...


@checked("lstm")
def lstm(
    input: Tensor,
    state: State | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    recompute: bool = False,
    return_cells: bool = False,
) -> tuple[Tensor, State] | tuple[Tensor, State, Tensor]:
    r"""One direction of one LSTM layer over a whole sequence.

    .. math:: i, f, g, o &= \sigma(a_i), \sigma(a_f), \tanh(a_g), \sigma(a_o), \qquad
              a = W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh} \\
              c_t &= f c_{t-1} + i g, \qquad h_t = o \tanh(c_t)

    with a projection :math:`h_t = W_{hr}\, o \tanh(c_t)`. Weights, gate order and results are those
    of `torch.nn.LSTM`; derivations in docs/math/lstm.md. Under autocast, tensors of several
    dtypes are cast to its; those of one dtype stay.

    Args:
        input: x [T, B, I], T >= 1; float32, float64, float16 or bfloat16, as all that follows. Or
            tokens, int64 or int32 [T, B], each the number of a one-hot vector x_t of width I:
            nothing is multiplied, a column of w_ih is looked up. `embedding @ w_ih.T` for w_ih.T
            reads rows of an embedding at the cost of one product of I rows.
        state: h [B, P] and c [B, H] before the first step; None for zeros.
        w_ih: [4 H, I], gates i, f, g, o one after the other. For tokens the transpose of a
            contiguous [I, 4 H] is read where it is.
        w_hh: [4 H, P].
        b_ih: [4 H].
        b_hh: [4 H].
        w_hr: [P, H] projection; without it P = H.
        lengths: [B] steps of each row, int64 or int32, 0 <= lengths <= T, in any order. At later
            times the output is zero, and nothing is computed. A row's result does not depend on
            its padding.
        reverse: run every row from its last token to its first.
        recompute: keep the output and c for backward, not the gates: a third of the memory, for
            two more products over the sequence in backward.
        return_cells: return also c of every step. It is differentiable.

    Returns:
        output [T, B, P]; (h_n [B, P], c_n [B, H]), the state after each row's last step; with
        `return_cells` also c [T, B, H].

    Raises:
        ValueError: a shape, dtype or device that does not fit; on the CPU also a length outside
            [0, T] or a token outside [0, I). On CUDA looking at them would stop the stream: lengths
            are limited to [0, T], a token outside fails an assertion on the device.

    Source: Hochreiter and Schmidhuber 1997, Gers et al. 2000;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html

    Example:
        >>> w_ih, w_hh = torch.randn(32, 5), torch.randn(32, 8)
        >>> output, (h, c) = seqkern.ops.lstm(torch.randn(7, 3, 5), None, w_ih, w_hh)
        >>> output.shape
        torch.Size([7, 3, 8])
    """
    h0, c0 = (None, None) if state is None else state
    tensors = (*agreed(input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr), lengths)
    if torch.compiler.is_compiling():
        result = _registry.active.lstm(*tensors, reverse, not recompute, True)
    elif _registry.is_transformed(*tensors[:-1]):
        plain: Any = reference.lstm
        result = *plain(*tensors, reverse=reverse), None
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        result = _registry.call(_Lstm.apply, *tensors, reverse, not recompute, True)
    else:
        forward = _registry.active.lstm_forward
        result = _registry.call(forward, *tensors, reverse, False, return_cells)
    output, h_n, c_n, cells, _ = result
    return (output, (h_n, c_n), cells) if return_cells else (output, (h_n, c_n))


# ---------------------------------------------------------------- fakes


def _fake(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    save_gates: bool,
    save_cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    H, P = check_layer("lstm", 4, (input, h0, w_ih, w_hh, b_ih, b_hh, lengths), w_hr)
    T, B = input.shape[:2]
    check_shape("lstm", "c0", c0, (B, H))
    return (
        w_hh.new_empty(T, B, P),
        w_hh.new_empty(B, P),
        w_hh.new_empty(B, H),
        w_hh.new_empty((T, B, H) if save_cells else (0,)),
        w_hh.new_empty((T, B, 4 * H) if save_gates else (0,)),
    )


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    input, _, _, w_ih, w_hh, w_hr = args[4:10]
    B = input.shape[1]
    H, P = w_hh.shape[0] // 4, w_hh.shape[1]
    projection = (P, H) if w_hr is not None else (0,)
    shapes = (input.shape, (B, P), (B, H), w_ih.shape, w_hh.shape, (4 * H,), projection)
    return fake_gradients(input, w_ih, shapes, args[-1], of_w_ih=3)


# ---------------------------------------------------------------- gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse, ctx.save_gates, _ = inputs
    output, _, _, cells, gates = outputs
    ctx.ops = _registry.active
    ctx.save_for_backward(*tensors, output, cells, gates)
    ctx.mark_non_differentiable(gates)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    *inputs, output, cells, gates = ctx.saved_tensors
    grad_output, grad_h_n, grad_c_n, grad_cells, _ = grads
    if not ctx.save_gates:
        gates = _preactivations(output, inputs, ctx.reverse)
    input, h0, c0, w_ih, w_hh, _, _, w_hr, lengths = inputs
    wanted = needs(ctx.needs_input_grad)
    op = partial(
        ctx.ops.lstm_backward,
        *(grad_output, grad_h_n, grad_c_n, grad_cells),
        *(input, h0, c0, w_ih, w_hh, w_hr, lengths, output, cells, gates),
        *(ctx.save_gates, ctx.reverse, wanted),
    )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        plain = partial(reference.lstm, reverse=ctx.reverse)
        found = differentiable(op, plain, grads[:4], inputs, wanted)
    else:
        found = op()
    return unpack(found, ctx.needs_input_grad, 12)


_Lstm = eager_function("lstm_forward", _setup, _backward)


def _preactivations(output: Tensor, inputs: tuple[Any, ...], reverse: bool) -> Tensor:
    """W_ih x_t + b_ih + W_hh h_{t-1} + b_hh of all steps [T, B, 4 H], from the output."""
    input, h0, _, w_ih, w_hh, b_ih, b_hh, _, lengths = inputs
    before = states_before(output, h0, lengths, reverse)
    x = rows_read(input, lengths)
    return input_product(x, w_ih, b_ih) + F.linear(before, w_hh, b_hh)


register_op("lstm", _fake, _fake_backward, _setup, _backward)
