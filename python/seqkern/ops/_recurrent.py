"""What the gradients of the recurrent ops share.

Their inputs begin alike: input, h, c, w_ih, w_hh, b_ih, b_hh, w_hr.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Which gradients the kernels' torch layer is asked for (csrc/torch/lstm.cpp), by position of the
# input; both biases have the same one.
_NEEDS = {0: 1, 1: 2, 2: 4, 3: 8, 4: 16, 5: 32, 6: 32, 7: 64}


def needs(needed: tuple[bool, ...]) -> int:
    """The bits of a backward op's argument from `ctx.needs_input_grad`."""
    bits = 0
    for position, bit in _NEEDS.items():
        if position < len(needed) and needed[position]:
            bits |= bit
    return bits


def unpack(
    grads: tuple[Tensor, ...], needed: tuple[bool, ...], inputs: int
) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs of an op from those its backward op returned, both biases alike."""
    by_position = (*grads[:6], *grads[5:])
    given = [by_position[i] if needed[i] else None for i in range(min(inputs, len(by_position)))]
    return (*given, *(None,) * (inputs - len(given)))


def second_derivative(
    forward: Any,
    grads: list[Tensor | None],
    inputs: list[Tensor | None],
    grad_grads: tuple[Tensor | None, ...],
    wanted_bits: int,
) -> list[Tensor | None]:
    """Gradients, at `grads` and `inputs`, of the first derivative of `forward`, whose kernel
    returned what `wanted_bits` says (both biases as one).
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        positions = {
            bit: position
            for position, bit in reversed(_NEEDS.items())
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
