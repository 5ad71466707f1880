"""Softmax-cross-entropy: `torch.nn.functional.cross_entropy` in one pass over the logits."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from seqkern import reference
from seqkern.ops import _registry
from seqkern.ops._double_backward import differentiable_backward
from seqkern.ops._fakes import check_shape, register_fake
from seqkern.ops._mistakes import checked, describe

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
REDUCTION_NAMES = tuple(REDUCTIONS)


def _diagnosis(error: Exception, target: Tensor, **_: Any) -> Exception | None:
    if "Promotion" not in str(error):  # of dtypes that torch adds to nothing
        return None
    return ValueError(
        "cross_entropy: target of class probabilities must be float32, float64, float16 or "
        f"bfloat16, got {describe(target)}"
    )


@overload
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@checked("cross_entropy", _diagnosis)
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Cross-entropy between the softmax of `logits` and `target`.

    For a row :math:`x` of logits (replaced by :math:`c\tanh(x/c)` when `softcap` :math:`c > 0`)
    and its class :math:`y`,

    .. math:: \ell = w_y\,(\mathrm{lse}(x) - x_y) + z\,\mathrm{lse}(x)^2,
              \qquad \mathrm{lse}(x) = \log \sum_v e^{x_v}

    with class probabilities, label smoothing, weights, `ignore_index` and reductions as in
    `torch.nn.functional.cross_entropy`; derivations in docs/math/cross_entropy.md.

    Args:
        logits: float32, float64, float16 or bfloat16, [V], [B, V] or [B, V, d1, ...]: class
            dimension 1. Any strides; read where they are when the class dimension has stride 1 and,
            on the CPU, when the dimensions after it are contiguous.
        target: classes, int64, int32 or uint8, [], [B] or [B, d1, ...]; or class probabilities,
            floating point, in the shape of `logits`.
        weight: [V] weight per class, floating point. It gets no gradient.
        ignore_index: a target of this value adds nothing to loss and gradient. Ignored rows are
            skipped.
        reduction: "none", "mean" (over the weights of the rows not ignored) or "sum".
        label_smoothing: in [0, 1]: this much of the target is spread evenly over the classes.
        z_loss: weight of the squared log-sum-exp; "mean" averages it over the rows not ignored.
        softcap: bound of the logits, as in Gemma 2; 0 for none.
        return_lse: return also the log-sum-exp per row, ignored rows included. It is
            differentiable.

    Returns:
        The loss, [] or, for "none", one value per row; with `return_lse` a pair with the
        log-sum-exp. Both are float64 for float64 logits and float32 otherwise, whatever the
        logits' own precision. The mean over no rows is NaN, as in PyTorch.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit.
        IndexError: on the CPU, a target outside [0, V) that is not `ignore_index`. On CUDA looking
            at it would stop the stream: such a row gives NaN as its loss and gradient, and nothing
            out of bounds is read.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.cross_entropy.html;
    z-loss: PaLM, arXiv:2204.02311, section 5.

    Example:
        >>> logits = torch.randn(4, 50257, requires_grad=True)
        >>> loss = seqkern.ops.cross_entropy(logits, torch.tensor([1, 2, 3, -100]))
        >>> loss.backward()
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"cross_entropy: reduction must be 'none', 'mean' or 'sum', got {reduction!r}"
        )
    if target.is_floating_point():
        if ignore_index >= 0:
            raise ValueError(
                "cross_entropy: ignore_index must be negative with class probabilities, "
                f"got {ignore_index}"
            )
        if target.dtype != logits.dtype:
            dtype = torch.promote_types(logits.dtype, target.dtype)
            logits, target = logits.to(dtype), target.to(dtype)
        if target.dim() > 2:
            target = target.movedim(1, -1)  # [B, d1, ..., V]
    if logits.dim() > 2:
        logits = logits.movedim(1, -1)  # [B, d1, ..., V]
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("cross_entropy: weight has no gradient here; pass weight.detach()")
    inputs = (
        logits,
        target,
        weight,
        ignore_index,
        REDUCTIONS[reduction],
        label_smoothing,
        z_loss,
        softcap,
        return_lse,
    )
    if torch.compiler.is_compiling():
        loss, lse, _ = _registry.active.cross_entropy(*inputs)
    elif _registry.is_transformed(logits, target):
        loss, lse = _plain(logits, target, weight, options=list(inputs[3:8]))
    elif torch.is_grad_enabled() and (logits.requires_grad or target.requires_grad):
        result = _registry.call(_CrossEntropy.apply, *inputs)
        loss, lse = result if return_lse else (result, None)
    else:
        loss, lse, _ = _registry.call(_registry.active.cross_entropy_forward, *inputs)
    return (loss, lse) if return_lse else loss


# ---------------------------------------------------------------- fakes


def _fake(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulate_dtype(logits)
    *rows, V = logits.shape
    check_shape(
        "cross_entropy", "target", target, (*rows, V) if target.is_floating_point() else rows
    )
    check_shape("cross_entropy", "weight", weight, (V,))
    reduced = reduction != REDUCTIONS["none"]
    saved = 2 * math.prod(rows) + (2 if reduced else 0)
    return (
        logits.new_empty(() if reduced else rows, dtype=acc),
        logits.new_empty(rows if return_lse else (0,), dtype=acc),
        logits.new_empty((saved,), dtype=acc),
    )


#: Fewer rows of a batch than this are not read side by side (csrc/torch/cross_entropy.cpp).
_FEWEST_SIDE_BY_SIDE = 16


def _side_by_side(t: Tensor) -> int:
    """Rows of a batch that lie side by side, as those of [B, V, d1, ...] do; 0 if they do not."""
    if t.dim() < 2 or t.shape[-1] == 1 or t.stride(-1) == 1:
        return 0
    side = 1
    for d in range(t.dim() - 2, 0 if t.dim() > 2 else -1, -1):
        if t.shape[d] != 1 and t.stride(d) != side:
            return 0
        side *= t.shape[d]
    return side if side >= _FEWEST_SIDE_BY_SIDE else 0


def _fake_backward(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    *_: Any,
) -> Tensor:
    side = _side_by_side(logits)
    if not side or (target.is_floating_point() and _side_by_side(target) != side):
        return logits.new_empty(logits.shape)
    batches = logits.shape[:1] if logits.dim() > 2 else ()
    by_class = (*batches, logits.shape[-1], *logits.shape[len(batches) : -1])
    return logits.new_empty(by_class).movedim(len(batches), -1)


def accumulate_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------- gradients


class _CrossEntropy(torch.autograd.Function):
    """The gradient as eager code takes it: the functions that are registered too, at a third of the
    cost of `torch.library`'s autograd wrapper (24 against 76 us a call at 1 x 16, 2 Zen 3 cores).

    Each output costs some microseconds, so that what is for backward alone is none.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        loss, lse, saved = _registry.active.cross_entropy_forward(*inputs)
        _save(ctx, inputs, saved)
        return (loss, lse) if inputs[-1] else loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


def _save(ctx: Any, inputs: tuple[Any, ...], saved: Tensor) -> None:
    logits, target, weight, *ctx.options, _ = inputs
    ctx.ops = _registry.active
    ctx.save_for_backward(logits, target, weight, saved)
    ctx.set_materialize_grads(False)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, lse, saved = output
    _save(ctx, inputs, saved)
    ctx.mark_non_differentiable(*((saved,) if inputs[-1] else (lse, saved)))


def _backward(
    ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None = None, _: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    logits, target, weight, saved = ctx.saved_tensors
    dlogits = dtarget = None
    if ctx.needs_input_grad[0]:
        op, inputs = ctx.ops.cross_entropy_backward, (logits, target, weight)
        tensors = (grad_loss, grad_lse, *inputs, saved)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            (dlogits,) = differentiable_backward(
                lambda: (op(*tensors, *ctx.options),),
                partial(_plain, options=ctx.options),
                [0],
                (grad_loss, grad_lse),
                inputs,
            )
        else:
            dlogits = op(*tensors, *ctx.options)
    if ctx.needs_input_grad[1] and grad_loss is not None:
        dtarget = _dtarget(grad_loss, logits, weight, ctx.options)
    return dlogits, dtarget, *(None,) * 7


def _dtarget(
    grad_loss: Tensor, logits: Tensor, weight: Tensor | None, options: list[Any]
) -> Tensor:
    """Gradient of class probabilities, (1 - label_smoothing) w_v (lse - x_v): plain PyTorch, since
    who trains both sides of a cross-entropy is rare.
    """
    _, reduction, label_smoothing, _, softcap = options
    x = logits.to(accumulate_dtype(logits))
    if softcap > 0:
        x = softcap * torch.tanh(x / softcap)
    if reduction == REDUCTIONS["mean"]:
        grad_loss = grad_loss / math.prod(x.shape[:-1])
    dtarget: Tensor = grad_loss.unsqueeze(-1) * (label_smoothing - 1) * x.log_softmax(-1)
    return (dtarget if weight is None else dtarget * weight.to(x.dtype)).to(logits.dtype)


def _plain(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    options: list[Any],
) -> tuple[Tensor, Tensor]:
    """The reference, in the precision of the kernels."""
    ignore_index, reduction, *others = options
    return reference.cross_entropy(
        logits.to(accumulate_dtype(logits)),
        target,
        weight,
        ignore_index,
        REDUCTION_NAMES[reduction],
        *others,
    )


@_registry.registration
def register(namespace: str) -> None:
    """Add fakes and gradients to the ops of `namespace`.

    Autocast is left to fall through on purpose: the kernels accumulate in float32 from any logits,
    so casting bfloat16 logits up first, as autocast does for torch's own, would only move twice
    the bytes.
    """
    register_fake(namespace, "cross_entropy", _fake)
    register_fake(namespace, "cross_entropy_forward", _fake)
    register_fake(namespace, "cross_entropy_backward", _fake_backward)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        _setup(ctx, inputs, output)
        ctx.ops = getattr(torch.ops, namespace)

    torch.library.register_autograd(f"{namespace}::cross_entropy", _backward, setup_context=setup)
