"""The GRU: one direction of one layer over a whole sequence."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seqkern import reference
from seqkern.ops import _registry
from seqkern.ops._autocast import agreed
from seqkern.ops._mistakes import checked
from seqkern.ops._recurrent import (
    GRU,
    check_layer,
    differentiable,
    eager_function,
    fake_hidden_backward,
    needs,
    register_op,
    rows_read,
    states_before,
    unpack,
)
from seqkern.reference.inputs import input_product


@checked("gru")
def gru(
    input: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""One direction of one GRU layer over a whole sequence.

    .. math:: r, z &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}),
              \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
              n &= \tanh(W_{in} x_t + b_{in} + r \, (W_{hn} h_{t-1} + b_{hn})), \qquad
              h_t = (1 - z) \, n + z \, h_{t-1}

    Weights, gate order and results are those of `torch.nn.GRU`; derivations in docs/math/gru.md.
    Under autocast, tensors of several dtypes are cast to its; those of one dtype stay.

    Args:
        input: x [T, B, I], T >= 1; float32, float64, float16 or bfloat16, as all that follows. Or
            tokens, int64 or int32 [T, B], the numbers of one-hot vectors, as in `seqkern.ops.lstm`.
        h0: [B, H], the state before the first step; None for zeros.
        w_ih: [3 H, I], gates r, z, n one after the other.
        w_hh: [3 H, H].
        b_ih: [3 H].
        b_hh: [3 H].
        lengths: [B] steps of each row, int64 or int32, 0 <= lengths <= T, in any order. At later
            times the output is zero, and nothing is computed. A row's result does not depend on
            its padding.
        reverse: run every row from its last token to its first.
        recompute: keep only the output for backward, not the gates: a fifth of the memory, for
            two more products over the sequence in backward.

    Returns:
        output [T, B, H]; h_n [B, H], the state after each row's last step.

    Raises:
        ValueError: a shape, dtype or device that does not fit; on the CPU also a length outside
            [0, T] or a token outside [0, I). CUDA: see `seqkern.ops.lstm`.

    Source: Cho et al. 2014; https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html

    Example:
        >>> w_ih, w_hh = torch.randn(24, 5), torch.randn(24, 8)
        >>> output, h_n = seqkern.ops.gru(torch.randn(7, 3, 5), None, w_ih, w_hh)
        >>> output.shape
        torch.Size([7, 3, 8])
    """
    tensors = (*agreed(input, h0, w_ih, w_hh, b_ih, b_hh), lengths)
    if torch.compiler.is_compiling():
        result = _registry.active.gru(*tensors, reverse, not recompute)
    elif _registry.is_transformed(*tensors[:-1]):
        plain: Any = reference.gru
        result = *plain(*tensors, reverse=reverse), None, None
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        result = _registry.call(_Gru.apply, *tensors, reverse, not recompute)
    else:
        result = _registry.call(_registry.active.gru_forward, *tensors, reverse, False)
    output, h_n, _, _ = result
    return output, h_n


# ---------------------------------------------------------------- fakes


def _fake(*args: Any) -> tuple[Tensor, ...]:
    H, _ = check_layer("gru", 3, args[:7])
    input, w_hh, save_gates = args[0], args[3], args[-1]
    T, B = input.shape[:2]
    return (
        w_hh.new_empty(T, B, H),
        w_hh.new_empty(B, H),
        w_hh.new_empty((T, B, 3 * H) if save_gates else (0,)),
        w_hh.new_empty((T, B, H) if save_gates else (0,)),
    )


# ---------------------------------------------------------------- gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse, ctx.save_gates = inputs
    output, _, gates, u_n = outputs
    ctx.ops = _registry.active
    ctx.save_for_backward(*tensors, output, gates, u_n)
    ctx.mark_non_differentiable(gates, u_n)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    *inputs, output, gates, u_n = ctx.saved_tensors
    if not ctx.save_gates:
        gates, u_n = _preactivations(output, inputs, ctx.reverse)
    input, h0, w_ih, w_hh, _, _, lengths = inputs
    wanted = needs(ctx.needs_input_grad, GRU)
    op = partial(
        ctx.ops.gru_backward,
        *(*grads[:2], input, h0, w_ih, w_hh, lengths, output, gates, u_n),
        *(ctx.save_gates, ctx.reverse, wanted),
    )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        plain = partial(reference.gru, reverse=ctx.reverse)
        found = differentiable(op, plain, grads[:2], inputs, wanted, GRU)
    else:
        found = op()
    return unpack(found, ctx.needs_input_grad, 9, GRU)


_Gru = eager_function("gru_forward", _setup, _backward)


def _preactivations(
    output: Tensor, inputs: tuple[Any, ...], reverse: bool
) -> tuple[Tensor, Tensor]:
    """Inputs of r, z, and n without its recurrent part [T, B, 3 H], and that part [T, B, H]."""
    input, h0, w_ih, w_hh, b_ih, b_hh, lengths = inputs
    H = w_hh.shape[1]
    a = input_product(rows_read(input, lengths), w_ih, b_ih)
    u = F.linear(states_before(output, h0, lengths, reverse), w_hh, b_hh)
    a[..., : 2 * H] += u[..., : 2 * H]
    return a, u[..., 2 * H :].contiguous()


register_op("gru", _fake, fake_hidden_backward(GRU), _setup, _backward)
