"""What the gradients of the recurrent ops share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seqkern.ops import _registry
from seqkern.ops._double_backward import differentiable_backward
from seqkern.ops._fakes import check_shape, register_fake
from seqkern.reference.inputs import without_absent_state, without_padding

# Which gradients the kernels' torch layer (csrc/torch) is asked for, by position of the input. Bit
# 2^n is result n of the backward op; where both biases have the same gradient, they share one.
LSTM_CELL = {0: 1, 1: 2, 2: 4, 3: 8, 4: 16, 5: 32, 6: 32}
LSTM = {**LSTM_CELL, 7: 64}
GRU = {0: 1, 1: 2, 2: 4, 3: 8, 4: 16, 5: 32}
RNN = {0: 1, 1: 2, 2: 4, 3: 8, 4: 16, 5: 16}


def needs(needed: tuple[bool, ...], layout: Mapping[int, int] = LSTM) -> int:
    """The bits of a backward op's argument from `ctx.needs_input_grad`."""
    bits = 0
    for position, bit in layout.items():
        if position < len(needed) and needed[position]:
            bits |= bit
    return bits


def unpack(
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    inputs: int,
    layout: Mapping[int, int] = LSTM,
) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs of an op from those its backward op returned.

    Each has memory of its own: a hook or clipping may change one in place.
    """
    given: list[Tensor | None] = []
    taken = 0
    for i in range(min(inputs, len(layout))):
        bit = layout[i]
        grad = grads[bit.bit_length() - 1] if needed[i] else None
        if grad is not None and taken & bit:
            grad = grad.clone()
        elif grad is not None:
            taken |= bit
        given.append(grad)
    return (*given, *(None,) * (inputs - len(given)))


def rows_read(input: Tensor, lengths: Tensor | None) -> Tensor:
    """The input with 0 in its padding, and nothing between its rows, for a product of PyTorch's.

    In bfloat16 that takes NaN from a neighbouring row of an odd width along (torch 2.13, AMX).
    """
    return without_padding(input, lengths).contiguous()


def states_before(
    output: Tensor, h0: Tensor | None, lengths: Tensor | None, reverse: bool
) -> Tensor:
    """State h before each step [T, B, P] from the output [T, B, P] and h0 [B, P] (None: zeros)."""
    if h0 is None:
        first = torch.zeros_like(output[:1])
    else:
        first = without_absent_state(h0, lengths).unsqueeze(0)
    if not reverse:
        return torch.cat((first, output[:-1]))
    before = torch.cat((output[1:], first))
    if lengths is None or h0 is None:
        return before
    times = torch.arange(output.shape[0], device=output.device).unsqueeze(-1)  # [T, 1]
    return torch.where((times == lengths - 1).unsqueeze(-1), first, before)


def differentiable(
    op: Callable[[], tuple[Tensor, ...]],
    plain: Callable[..., tuple[Tensor, ...]],
    upstream: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    wanted: int,
    layout: Mapping[int, int] = LSTM,
) -> tuple[Tensor | None, ...]:
    """The backward op as a differentiable function (see `differentiable_backward`), for the bits
    that it was asked for.
    """
    made: list[int | None] = [None] * max(layout.values()).bit_length()
    for position, bit in reversed(list(layout.items())):
        if wanted & bit and position < len(inputs) and inputs[position] is not None:
            made[bit.bit_length() - 1] = position
    return differentiable_backward(op, plain, made, upstream, inputs)


def check_layer(
    op: str, gates: int, tensors: Sequence[Any], w_hr: Tensor | None = None
) -> tuple[int, int]:
    """H and P, after a look at the shapes of input, h0, w_ih, w_hh, b_ih, b_hh and lengths.

    For fakes. Those of another device have been refused before (`register_fake`).
    """
    input, h0, w_ih, w_hh, b_ih, b_hh, lengths = tensors
    features = [None] if input.is_floating_point() else []
    check_shape(op, "input", input, (None, None, *features))
    check_shape(op, "w_hh", w_hh, (None, None))
    B, G = input.shape[1], w_hh.shape[0]
    H = P = w_hh.shape[1]
    if w_hr is not None:
        H = G // gates
        check_shape(op, "w_hr", w_hr, (P, H))
    check_shape(op, "w_hh", w_hh, (gates * H, P))
    check_shape(op, "w_ih", w_ih, (G, input.shape[2] if features else None))
    check_shape(op, "h0", h0, (B, P))
    check_shape(op, "b_ih", b_ih, (G,))
    check_shape(op, "b_hh", b_hh, (G,))
    check_shape(op, "lengths", lengths, (B,))
    return H, P


def fake_gradients(
    input: Tensor, w_ih: Tensor, shapes: Sequence[Sequence[int]], wanted: int, of_w_ih: int
) -> tuple[Tensor, ...]:
    """Fakes of what a backward op returns: result n where `wanted` has bit n.

    Tokens have no gradient, and that of their w_ih is made as the table's, [I, gates * H].
    """
    are_tokens = not input.is_floating_point()
    found = []
    for n, shape in enumerate(shapes):
        if not wanted & (1 << n) or (are_tokens and n == 0):
            found.append(w_ih.new_empty(0))
        elif are_tokens and n == of_w_ih:
            found.append(w_ih.new_empty(shape[::-1]).t())
        else:
            found.append(w_ih.new_empty(shape))
    return tuple(found)


def fake_hidden_backward(layout: Mapping[int, int]) -> Callable[..., tuple[Tensor, ...]]:
    """The fake of a backward op of a layer whose state is h alone."""
    results = max(layout.values()).bit_length()

    def fake(*args: Any) -> tuple[Tensor, ...]:
        input, _, w_ih, w_hh = args[2:6]
        G, H = w_hh.shape
        shapes = (input.shape, (input.shape[1], H), w_ih.shape, w_hh.shape, (G,), (G,))
        return fake_gradients(input, w_ih, shapes[:results], args[-1], of_w_ih=2)

    return fake


def fake_cell(op: str, gates: int, args: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The input of a cell's op whose state is h alone, and its next state."""
    input, h, w_ih, w_hh, b_ih, b_hh = args[:6]
    check_shape(op, "h", h, (None, None))
    B, H = h.shape
    check_shape(op, "input", input, (B, None))
    check_shape(op, "w_ih", w_ih, (gates * H, input.shape[1]))
    check_shape(op, "w_hh", w_hh, (gates * H, H))
    check_shape(op, "b_ih", b_ih, (gates * H,))
    check_shape(op, "b_hh", b_hh, (gates * H,))
    return input, input.new_empty(h.shape)


def fake_hidden_cell_backward(layout: Mapping[int, int]) -> Callable[..., tuple[Tensor, ...]]:
    """The fake of the backward of such an op."""
    results = max(layout.values()).bit_length()

    def fake(*args: Any) -> tuple[Tensor, ...]:
        input, h, w_ih, w_hh = args[1:5]
        shapes = (input.shape, h.shape, w_ih.shape, w_hh.shape, w_ih.shape[:1], w_ih.shape[:1])
        return fake_gradients(input, w_ih, shapes[:results], args[-1], of_w_ih=2)

    return fake


def register_op(
    op: str,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    setup: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Add fakes and gradients to an op, its `_forward` and its `_backward`, in every namespace."""

    @_registry.registration
    def register(namespace: str) -> None:
        ops = getattr(torch.ops, namespace)

        def setup_there(ctx: Any, inputs: Any, output: Any) -> None:
            setup(ctx, inputs, output)
            ctx.ops = ops

        for name in (op, f"{op}_forward"):
            register_fake(namespace, name, fake)
        register_fake(namespace, f"{op}_backward", fake_backward)
        torch.library.register_autograd(f"{namespace}::{op}", backward, setup_context=setup_there)


def eager_function(
    forward_op: str, setup: Callable[..., None], backward_of: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The gradient as eager code takes it (see ops/cross_entropy.py), for an op and its setup."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            output = getattr(_registry.active, forward_op)(*inputs)
            setup(ctx, inputs, output)
            return output  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
            return backward_of(ctx, *grads)  # type: ignore[no-any-return]

    Eager.__name__ = forward_op.removesuffix("_forward").title().replace("_", "")
    return Eager
