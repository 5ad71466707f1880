"""Second derivatives through the references: an op's backward as a differentiable function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_BATCHED = [torch._C._dispatch_key_parse(name) for name in ("Batched", "FuncTorchBatched")]


def differentiable_backward(
    op: Callable[[], Sequence[Tensor]],
    plain: Callable[..., Sequence[Tensor]],
    made: Sequence[int | None],
    upstream: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """What `op` returns, as a function of `upstream` and `inputs` with derivatives of any order.

    What an op saves for its backward is a function of its inputs here, and gets no gradient of its
    own.

    Args:
        op: the kernel of the backward, with its arguments bound.
        plain: the outputs of the forward in plain PyTorch, from `inputs`. It must hold no tensor
            that may need gradients.
        made: for each of the kernel's results the input whose gradient it is; None: nobody's.
        upstream: the gradient of each of `plain`'s outputs; None: not part of it.
        inputs: all tensors that `plain` takes.
    """
    if any(g is not None and is_batched(g) for g in upstream):
        # Many gradients at once, in which a Function's result would have no graph.
        sources = [t if t is None or not t.requires_grad else t.view_as(t) for t in inputs]
        return _gradients(plain(*sources), upstream, [i if i is None else sources[i] for i in made])
    result: tuple[Tensor, ...] = _Backward.apply(  # type: ignore[no-untyped-call]
        op, plain, made, len(upstream), *upstream, *inputs
    )
    return result


class _Backward(torch.autograd.Function):
    """The kernel forward; backward differentiates the gradient of the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Callable[[], Sequence[Tensor]],
        plain: Callable[..., Sequence[Tensor]],
        made: Sequence[int | None],
        outputs: int,
        *sources: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*sources)
        ctx.plain, ctx.made, ctx.outputs = plain, made, outputs
        ctx.set_materialize_grads(False)
        return tuple(op())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        create_graph = torch.is_grad_enabled()
        needed = ctx.needs_input_grad[4:]
        by_result = [None if i is None else ctx.outputs + i for i in ctx.made]

        def alias(i: int, t: Tensor) -> Tensor:
            return _alias(t, create_graph) if needed[i] or i in by_result else t.detach()

        with torch.enable_grad():
            sources = [t if t is None else alias(i, t) for i, t in enumerate(ctx.saved_tensors)]
            outputs = ctx.plain(*sources[ctx.outputs :])
            first = _gradients(
                outputs, sources[: ctx.outputs], [i if i is None else sources[i] for i in by_result]
            )
            second = _gradients(
                first,
                grads,
                [t if needs else None for t, needs in zip(sources, needed, strict=True)],
                create_graph,
            )
        return (None, None, None, None, *second)


def is_batched(t: Tensor) -> bool:
    """Whether it is what `is_grads_batched` or `torch.func.vmap` make of a gradient."""
    keys = torch._C._dispatch_keys(t)
    return any(keys.has(key) for key in _BATCHED)


def _alias(t: Tensor, create_graph: bool) -> Tensor:
    """`t` as something to differentiate by in a graph of its own.

    `t` may be the result of other operations, among them those that a gradient from outside, or
    another of the inputs, was made of. Differentiating by `t` itself, autograd would walk on into
    them: count twice what the pass around this one counts, and free what it needs. Through the
    alias, their graph is reached only by who differentiates the result.
    """
    if create_graph and t.requires_grad:
        return t.view_as(t)
    return t.detach().requires_grad_()


def _gradients(
    outputs: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
    by: Sequence[Tensor | None],
    create_graph: bool = True,
) -> tuple[Tensor | None, ...]:
    """The gradient of each of `by`, None for None and for what is no part of the outputs."""
    pairs = [
        (out, grad.to(out.dtype))
        for out, grad in zip(outputs, upstream, strict=True)
        if out is not None and out.requires_grad and grad is not None
    ]
    wanted = [t for t in by if t is not None]
    if not pairs or not wanted:
        return (None,) * len(by)
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return tuple(t if t is None else next(found) for t in by)
