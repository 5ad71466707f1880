"""What the gradients of the recurrent ops share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seqkern.ops import _registry

# Which gradients the kernels' torch layer (csrc/torch) is asked for, by position of the input. Bit
# 2^n is result n of the backward op; where both biases have the same gradient, they share one.
LSTM = {0: 1, 1: 2, 2: 4, 3: 8, 4: 16, 5: 32, 6: 32, 7: 64}
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
    grads: tuple[Tensor, ...],
    needed: tuple[bool, ...],
    inputs: int,
    layout: Mapping[int, int] = LSTM,
) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs of an op from those its backward op returned."""
    given = [
        grads[layout[i].bit_length() - 1] if needed[i] else None
        for i in range(min(inputs, len(layout)))
    ]
    return (*given, *(None,) * (inputs - len(given)))


def states_before(
    output: Tensor, h0: Tensor | None, lengths: Tensor | None, reverse: bool
) -> Tensor:
    """State h before each step [T, B, P] from the output [T, B, P] and h0 [B, P] (None: zeros)."""
    first = torch.zeros_like(output[:1]) if h0 is None else h0.unsqueeze(0)
    if not reverse:
        return torch.cat((first, output[:-1]))
    before = torch.cat((output[1:], first))
    if lengths is None or h0 is None:
        return before
    times = torch.arange(output.shape[0], device=output.device).unsqueeze(-1)  # [T, 1]
    return torch.where((times == lengths - 1).unsqueeze(-1), first, before)


def second_derivative(
    forward: Any,
    grads: list[Tensor | None],
    inputs: list[Tensor | None],
    grad_grads: tuple[Tensor | None, ...],
    wanted_bits: int,
    layout: Mapping[int, int] = LSTM,
) -> list[Tensor | None]:
    """Gradients, at `grads` and `inputs`, of the first derivative of `forward`, whose kernel
    returned what `wanted_bits` says.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        positions = {
            bit: position
            for position, bit in reversed(list(layout.items()))
            if wanted_bits & bit and position < len(inputs) and inputs[position] is not None
        }
        tensors: list[Any] = [
            t if t is None or t.requires_grad or i not in positions.values()
            else t.detach().requires_grad_()
            for i, t in enumerate(inputs)
        ]  # fmt: skip
        outputs = forward(*tensors)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        order = sorted(positions)
        first = torch.autograd.grad(
            [o for o, _ in pairs],
            [tensors[positions[bit]] for bit in order],
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
        results = [
            (d, grad_grads[bit.bit_length() - 1])
            for bit, d in zip(order, first, strict=True)
            if d is not None and d.requires_grad and grad_grads[bit.bit_length() - 1] is not None
        ]
        sources: list[Any] = [*grads, *tensors]
        wanted = [i for i, s in enumerate(sources) if s is not None and s.requires_grad]
        found = torch.autograd.grad(
            [d for d, _ in results],
            [sources[i] for i in wanted],
            [g for _, g in results],
            create_graph=create_graph,
            allow_unused=True,
        )
    given: list[Tensor | None] = [None] * len(sources)
    for i, grad in zip(wanted, found, strict=True):
        given[i] = grad
    return given


class DifferentiableBackward(torch.autograd.Function):
    """A backward op of a layer whose state is h alone, as a differentiable function.

    The kernel forward; backward differentiates the reference. Inputs: the backward op with its
    arguments bound, the reference, the layout, the bits of what is wanted; then what may need
    gradients: those of the two outputs, and the op's tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        op: Callable[[], tuple[Tensor, ...]],
        plain: Callable[..., tuple[Tensor, ...]],
        layout: Mapping[int, int],
        wanted: int,
        *sources: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*(s for s in sources if s is not None))
        ctx.given = [s is not None for s in sources]
        ctx.plain, ctx.layout, ctx.wanted = plain, layout, wanted
        ctx.set_materialize_grads(False)
        return op()

    @staticmethod
    def backward(ctx: Any, *grad_grads: Any) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        sources = [next(saved) if given else None for given in ctx.given]
        found = second_derivative(
            ctx.plain, sources[:2], sources[2:], grad_grads, ctx.wanted, ctx.layout
        )
        return (None, None, None, None, *found)


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

    return Eager
