"""Second derivatives through the references: what the ops' differentiable backwards share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def leaf(t: Tensor) -> Tensor:
    """`t` as something to differentiate by: itself if it is part of a graph."""
    return t if t.requires_grad else t.detach().requires_grad_()


def second_derivative(
    outputs: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    leaves: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    sources: Sequence[Tensor | None],
    ctx: Any,
    create_graph: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients for a Function that is the backward of an op.

    The first derivative of `outputs` by `leaves`, for the gradients `upstream`, is differentiated
    once more, for the gradients `grads`. What an op saves for its backward is a function of the
    leaves here, and gets no gradient of its own.

    Args:
        outputs: of the reference, made with gradients enabled.
        upstream: of each output; None: not part of it.
        leaves: what the backward differentiates by.
        grads: of each of the backward's results; None: not part of it.
        sources: the Function's inputs from its second on that may need gradients.
        ctx: of that Function.
        create_graph: whether the result is to be differentiated again.

    Returns:
        A gradient or None for each input of the Function.
    """
    with torch.enable_grad():
        used = [(o, g) for o, g in zip(outputs, upstream, strict=True) if g is not None]
        first = torch.autograd.grad(
            [o for o, _ in used], leaves, [g for _, g in used], create_graph=True
        )
        pairs = [(d, g) for d, g in zip(first, grads, strict=True) if g is not None]
        wanted = [i for i in range(len(sources)) if ctx.needs_input_grad[1 + i]]
        by: list[Any] = [sources[i] for i in wanted]
        found = torch.autograd.grad(
            [d for d, _ in pairs],
            by,
            [g.to(d.dtype) for d, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for i, grad in zip(wanted, found, strict=True):
        result[1 + i] = grad
    return tuple(result)
