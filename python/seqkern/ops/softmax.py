"""Softmax and log-softmax over the last dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqkern import reference
from seqkern.ops import _registry
from seqkern.ops._fakes import register_fake
from seqkern.ops._mistakes import checked


@checked("softmax")
def softmax(x: Tensor) -> Tensor:
    r"""Softmax over the last dimension.

    .. math:: y_v = \frac{e^{x_v - m}}{\sum_u e^{x_u - m}}, \qquad m = \max_v x_v

    Args:
        x: [..., V], float32, float64, float16 or bfloat16; any strides, read where they are when
            the last dimension has stride 1.

    Returns:
        [..., V], contiguous, in the dtype of x; 16-bit rows are summed in float32. A row of nothing
        but -inf, or with +inf or NaN, is NaN, as in PyTorch.

    Raises:
        ValueError: x is a scalar or of another dtype.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.softmax.html;
    gradient in docs/math/softmax.md.

    Example:
        >>> seqkern.ops.softmax(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor([0.5000, 0.5000, 0.0000])
    """
    return _softmax(x, log=False)


def _diagnosis(error: Exception, x: Tensor) -> Exception | None:
    text = str(error)  # of the op that both functions are
    return type(error)(f"log_{text}") if text.startswith("softmax: ") else None


@checked("log_softmax", _diagnosis)
def log_softmax(x: Tensor) -> Tensor:
    r"""Logarithm of the softmax over the last dimension.

    .. math:: y_v = (x_v - m) - \log \sum_u e^{x_u - m}, \qquad m = \max_v x_v

    Arguments, result and errors as for `softmax`.

    Example:
        >>> seqkern.ops.log_softmax(torch.tensor([3.0, 3.0]))
        tensor([-0.6931, -0.6931])
    """
    return _softmax(x, log=True)


def _softmax(x: Tensor, log: bool) -> Tensor:
    y: Tensor
    if torch.compiler.is_compiling():
        y = _registry.active.softmax(x, log)
    elif _registry.is_transformed(x):
        y = x.log_softmax(-1) if log else x.softmax(-1)
    elif torch.is_grad_enabled() and x.requires_grad:
        y = _registry.call(_Softmax.apply, x, log)
    else:
        y = _registry.call(_registry.active.softmax_forward, x, log)
    return y


class _Softmax(torch.autograd.Function):
    """The gradient as eager code takes it, without the cost of `torch.library`'s wrapper."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: bool) -> Tensor:
        y: Tensor = _registry.active.softmax_forward(x, log)
        _setup(ctx, (x, log), y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None]:
        return _backward(ctx, *grads)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.ops, ctx.log = _registry.active, inputs[1]
    ctx.save_for_backward(output)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    (y,) = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        return reference.softmax_backward(dy, y, ctx.log), None
    return ctx.ops.softmax_backward(dy, y, ctx.log), None


def _fake(x: Tensor, log: bool) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(dy: Tensor, y: Tensor, log: bool) -> Tensor:
    return y.new_empty(y.shape)


@_registry.registration
def register(namespace: str) -> None:
    """Add fakes and gradients to the ops of `namespace`."""
    register_fake(namespace, "softmax", _fake)
    register_fake(namespace, "softmax_forward", _fake)
    register_fake(namespace, "softmax_backward", _fake_backward)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        _setup(ctx, inputs, output)
        ctx.ops = getattr(torch.ops, namespace)

    torch.library.register_autograd(f"{namespace}::softmax", _backward, setup_context=setup)
