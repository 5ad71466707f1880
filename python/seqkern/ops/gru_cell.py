"""One step of the GRU."""

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
    GRU,
    differentiable,
    eager_function,
    fake_cell,
    fake_hidden_cell_backward,
    needs,
    register_op,
    unpack,
)


@checked("gru_cell")
def gru_cell(
    input: Tensor,
    h: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a GRU, as `gru` defines it.

    Args:
        input: [B, I]; float32, float64, float16 or bfloat16, as all that follows.
        h: [B, H], the state; None for zeros.
        w_ih: [3 H, I], gates r, z, n one after the other.
        w_hh: [3 H, H].
        b_ih: [3 H].
        b_hh: [3 H].

    Returns:
        The next h [B, H].

    Raises:
        ValueError: a shape, dtype or device that does not fit.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html

    Example:
        >>> w_ih, w_hh = torch.randn(24, 5), torch.randn(24, 8)
        >>> h = seqkern.ops.gru_cell(torch.randn(3, 5), torch.zeros(3, 8), w_ih, w_hh)
    """
    if h is None:
        h = input.new_zeros(*input.shape[:1], w_hh.shape[-1])
    input, h, *weights = agreed(input, h, w_ih, w_hh, b_ih, b_hh)
    return step(input, h, tuple(weights))


def step(
    input: Tensor, h: Tensor, weights: tuple[Any, ...], packed: Tensor | None = None
) -> Tensor:
    """`gru_cell` with what `PackedWeights.of` (ops/_packed_weights.py) has of its weights."""
    tensors = (input, h, *weights)
    result: Tensor
    if torch.compiler.is_compiling():
        result, _ = _registry.active.gru_cell(*tensors, True)
    elif _registry.is_transformed(*tensors):
        result = reference.gru_cell(*tensors)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        result, _ = _registry.call(_GruCell.apply, *tensors, packed, True)
    else:
        result, _ = _registry.call(_registry.active.gru_cell_forward, *tensors, packed, False)
    return result


# ---------------------------------------------------------------- fakes


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    input, h = fake_cell("gru_cell", 3, args)
    return h, input.new_empty((input.shape[0], 4 * h.shape[1]) if args[-1] else (0,))


# ---------------------------------------------------------------- gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    ctx.ops = _registry.active
    ctx.save_for_backward(*inputs[:6], outputs[1])
    ctx.mark_non_differentiable(outputs[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    *inputs, gates = ctx.saved_tensors
    wanted = needs(ctx.needs_input_grad[:6], GRU)
    op = partial(ctx.ops.gru_cell_backward, grads[0], *inputs[:4], gates, wanted)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        found = differentiable(op, _plain, grads[:1], inputs, wanted, GRU)
    else:
        found = op()
    return unpack(found, ctx.needs_input_grad, len(ctx.needs_input_grad), GRU)


_GruCell = eager_function("gru_cell_forward", _setup, _backward)


def _plain(*inputs: Any) -> tuple[Tensor]:
    return (reference.gru_cell(*inputs),)


register_op("gru_cell", _fake, fake_hidden_cell_backward(GRU), _setup, _backward)
