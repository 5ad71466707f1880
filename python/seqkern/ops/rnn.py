"""The RNN: one direction of one layer over a whole sequence."""

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
    check_layer,
    differentiable,
    eager_function,
    fake_hidden_backward,
    needs,
    register_op,
    unpack,
)


@checked("rnn")
def rnn(
    input: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""One direction of one layer of an Elman RNN over a whole sequence.

    .. math:: h_t = \phi(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    with :math:`\phi` tanh or relu. Weights and results are those of `torch.nn.RNN`; derivations in
    docs/math/rnn.md. Only the output is kept for backward. Under autocast, tensors of several
    dtypes are cast to its; those of one dtype stay.

    Args:
        input: x [T, B, I], T >= 1; float32, float64, float16 or bfloat16, as all that follows. Or
            tokens, int64 or int32 [T, B], the numbers of one-hot vectors, as in `seqkern.ops.lstm`.
        h0: [B, H], the state before the first step; None for zeros.
        w_ih: [H, I].
        w_hh: [H, H].
        b_ih: [H].
        b_hh: [H].
        nonlinearity: "tanh" or "relu".
        lengths: [B] steps of each row, int64 or int32, 0 <= lengths <= T, in any order. At later
            times the output is zero, and nothing is computed. A row's result does not depend on
            its padding.
        reverse: run every row from its last token to its first.

    Returns:
        output [T, B, H]; h_n [B, H], the state after each row's last step.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or another nonlinearity; on the CPU
            also a length outside [0, T] or a token outside [0, I). CUDA: see `seqkern.ops.lstm`.

    Source: Elman 1990; https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html

    Example:
        >>> w_ih, w_hh = torch.randn(8, 5), torch.randn(8, 8)
        >>> output, h_n = seqkern.ops.rnn(torch.randn(7, 3, 5), None, w_ih, w_hh)
        >>> output.shape
        torch.Size([7, 3, 8])
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    tensors = (*agreed(input, h0, w_ih, w_hh, b_ih, b_hh), lengths)
    options = (reverse, nonlinearity == "relu")
    result: tuple[Tensor, Tensor]
    if torch.compiler.is_compiling():
        result = _registry.active.rnn(*tensors, *options)
    elif _registry.is_transformed(*tensors[:-1]):
        plain: Any = reference.rnn
        result = plain(*tensors, nonlinearity=nonlinearity, reverse=reverse)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        result = _registry.call(_Rnn.apply, *tensors, *options)
    else:
        result = _registry.call(_registry.active.rnn_forward, *tensors, *options)
    return result


# ---------------------------------------------------------------- gradients


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    H, _ = check_layer("rnn", 1, args[:7])
    input, w_hh = args[0], args[3]
    T, B = input.shape[:2]
    return w_hh.new_empty(T, B, H), w_hh.new_empty(B, H)


def _setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse, ctx.relu = inputs
    ctx.ops = _registry.active
    ctx.save_for_backward(*tensors, outputs[0])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    *inputs, output = ctx.saved_tensors
    input, h0, w_ih, w_hh, _, _, lengths = inputs
    wanted = needs(ctx.needs_input_grad, RNN)
    op = partial(
        ctx.ops.rnn_backward,
        *(*grads, input, h0, w_ih, w_hh, lengths, output),
        *(ctx.reverse, ctx.relu, wanted),
    )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        nonlinearity = "relu" if ctx.relu else "tanh"
        plain = partial(reference.rnn, reverse=ctx.reverse, nonlinearity=nonlinearity)
        found = differentiable(op, plain, grads, inputs, wanted, RNN)
    else:
        found = op()
    return unpack(found, ctx.needs_input_grad, 9, RNN)


_Rnn = eager_function("rnn_forward", _setup, _backward)


register_op("rnn", _fake, fake_hidden_backward(RNN), _setup, _backward)
