"""One step of the LSTM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqkern import reference
from seqkern.ops import _registry
from seqkern.ops._recurrent import eager_function, needs, second_derivative, unpack

State = tuple[Tensor, Tensor]


def lstm_cell(
    input: Tensor,
    state: State,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> State:
    """One step of an LSTM, as `lstm` defines it.

    Args:
        input: [B, I]; float32, float64, float16 or bfloat16, as all that follows.
        state: h [B, H] and c [B, H].
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
    tensors = (input, *state, w_ih, w_hh, b_ih, b_hh)
    if torch.compiler.is_compiling():
        h, c, _ = _registry.active.lstm_cell(*tensors, True)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        h, c, _ = _registry.call(_LstmCell.apply, *tensors, True)
    else:
        h, c, _ = _registry.call(_registry.active.lstm_cell_forward, *tensors, False)
    return h, c


# ---------------------------------------------------------------- fakes


def _fake(
    input: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    save_gates = rest[-1]
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
    inputs, (c1, gates) = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    wanted = needs(ctx.needs_input_grad[:7])
    arguments = (*grads[:2], *inputs[:5], c1, gates, wanted)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        apply: Any = _LstmCellBackward.apply
        found = apply(ctx.ops, wanted, arguments, *grads[:2], *inputs)
    else:
        found = ctx.ops.lstm_cell_backward(*arguments)
    return unpack(found, ctx.needs_input_grad, 8)


_LstmCell = eager_function("lstm_cell_forward", _setup, _backward)


class _LstmCellBackward(torch.autograd.Function):
    """The gradients as differentiable functions: the kernel forward, the reference backward."""

    @staticmethod
    def forward(
        ctx: Any, ops: Any, wanted: int, arguments: Any, *sources: Any
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*(s for s in sources if s is not None))
        ctx.given = [s is not None for s in sources]
        ctx.needs = wanted
        ctx.set_materialize_grads(False)
        return ops.lstm_cell_backward(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad_grads: Any) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        sources = [next(saved) if given else None for given in ctx.given]

        def forward(*tensors: Any) -> tuple[Tensor, ...]:
            return reference.lstm_cell(tensors[0], tensors[1:3], *tensors[3:])

        found = second_derivative(forward, sources[:2], sources[2:], grad_grads, ctx.needs)
        return (None, None, None, *found)


@_registry.registration
def register(namespace: str) -> None:
    """Add fakes and gradients to the ops of `namespace`."""
    ops = getattr(torch.ops, namespace)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        _setup(ctx, inputs, output)
        ctx.ops = ops

    for name in ("lstm_cell", "lstm_cell_forward"):
        torch.library.register_fake(f"{namespace}::{name}", _fake)
    torch.library.register_fake(f"{namespace}::lstm_cell_backward", _fake_backward)
    torch.library.register_autograd(f"{namespace}::lstm_cell", _backward, setup_context=setup)
