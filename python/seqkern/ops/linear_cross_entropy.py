"""Linear-cross-entropy: the loss of a language-model head without its logits in memory."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqkern import reference
from seqkern.ops import _registry
from seqkern.ops._autocast import autocast
from seqkern.ops._double_backward import differentiable_backward, is_batched
from seqkern.ops._fakes import check_shape, register_fake
from seqkern.ops._mistakes import checked
from seqkern.ops.cross_entropy import REDUCTION_NAMES, REDUCTIONS, accumulate_dtype


@checked("linear_cross_entropy")
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: bool = False,
    return_logprobs: bool = False,
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""Cross-entropy of `F.linear(hidden, weight, bias)`, whose [N, V] logits never exist at once.

    The loss is `seqkern.ops.cross_entropy` of the logits :math:`x_n = W h_n + b`. Rows are taken
    in chunks, and with "mean" or "sum" the gradients are made in the forward pass, from logits
    that are still in cache. For "none", and where the log-sum-exp or the log-probabilities are
    asked for, a row's incoming gradient is known only in the backward pass, which then makes the
    logits again: one GEMM more than plain PyTorch, in the memory of one tile. Without gradients
    there is one GEMM. Derivations: docs/math/linear_cross_entropy.md.

    Args:
        hidden: [..., H], float32, float64, float16 or bfloat16. Under autocast it is cast, with
            weight and bias, as for `F.linear`.
        weight: [V, H], of hidden's dtype. A parameter or input without gradient costs no GEMM.
        target: classes, int64, int32 or uint8, [...].
        bias: [V] or None.
        class_weight: [V] weight per class, `weight` in `F.cross_entropy`. It gets no gradient.
        reduction: "none", "mean" (over the weights of the rows not ignored) or "sum".
        ignore_index: a target of this value adds nothing to loss and gradients. On the CPU such
            rows cost nothing, unless `return_lse` asks for theirs; on CUDA, where counting them
            would stop the stream, they still take part in the GEMMs, and NaN or infinity in their
            hidden values reaches the weight's gradient, as in PyTorch.
        label_smoothing: in [0, 1]: this much of the target is spread evenly over the classes.
        z_loss: weight of the squared log-sum-exp; "mean" averages it over the rows not ignored.
        softcap: bound of the logits, as in Gemma 2; 0 for none.
        return_lse: return also the log-sum-exp per row, ignored rows included; differentiable.
        return_logprobs: return also log p(target) per row, 0 for ignored rows; differentiable.
        chunk_bytes: memory for logits; None chooses. Smaller is slower: a chunk's share of the
            weight's gradient is added to memory each time.

    Returns:
        The loss, [] or, for "none", one value per row; with `return_lse` or `return_logprobs` a
        tuple that goes on with those, [...]. All are float64 for float64 and float32 otherwise.
        Products of 16-bit inputs are summed, kept and differentiated in float32. The mean over no
        rows is NaN, as in PyTorch.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit.
        IndexError: on the CPU, a target outside [0, V) that is not `ignore_index`. On CUDA such a
            row gives NaN as its loss and gradient, and nothing out of bounds is read.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.cross_entropy.html;
    chunks with gradients made in the forward pass: Liger Kernel, arXiv:2410.10989, section 3.2.

    Example:
        >>> hidden = torch.randn(4, 768, requires_grad=True)
        >>> head = torch.nn.Linear(768, 50257, bias=False)
        >>> target = torch.tensor([1, 2, 3, -100])
        >>> loss = seqkern.ops.linear_cross_entropy(hidden, head.weight, target)
        >>> loss.backward()
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"linear_cross_entropy: reduction must be 'none', 'mean' or 'sum', got {reduction!r}"
        )
    if class_weight is not None and class_weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "linear_cross_entropy: class_weight has no gradient here; pass class_weight.detach()"
        )
    hidden, weight, bias = autocast(hidden, weight, bias)
    grads = tuple(
        t is not None and t.requires_grad and torch.is_grad_enabled()
        for t in (hidden, weight, bias)
    )
    inputs = (
        hidden,
        weight,
        target,
        bias,
        class_weight,
        ignore_index,
        REDUCTIONS[reduction],
        label_smoothing,
        z_loss,
        softcap,
        return_lse,
        return_logprobs,
        *grads,
        0 if chunk_bytes is None else chunk_bytes,
    )
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"linear_cross_entropy: chunk_bytes must be positive, got {chunk_bytes}")
    if torch.compiler.is_compiling():
        outputs = _registry.active.linear_cross_entropy(*inputs)
    elif _registry.is_transformed(hidden, weight, bias):
        options = list(inputs[5:10])
        outputs = _plain(hidden, weight, bias, target, class_weight, options=options)
    elif any(grads):
        outputs = _registry.call(_LinearCrossEntropy.apply, *inputs)
    else:
        outputs = _registry.call(_registry.active.linear_cross_entropy_forward, *inputs)
    wanted = (True, return_lse, return_logprobs)
    result = tuple(out for out, want in zip(outputs, wanted, strict=False) if want)
    return result if len(result) > 1 else result[0]


# ---------------------------------------------------------------- fakes


def _fake(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    return_lse: bool,
    return_logprobs: bool,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
    chunk_bytes: int,
) -> tuple[Tensor, ...]:
    *rows, H = hidden.shape
    check_shape("linear_cross_entropy", "weight", weight, (None, H))
    check_shape("linear_cross_entropy", "target", target, rows)
    for name, t in (("bias", bias), ("class_weight", class_weight)):
        check_shape("linear_cross_entropy", name, t, weight.shape[:1])
    reduced = reduction != REDUCTIONS["none"]
    fused = reduced and not return_lse and not return_logprobs

    def empty(shape: Any) -> Tensor:
        return hidden.new_empty(shape, dtype=accumulate_dtype(hidden))

    return (
        empty(() if reduced else rows),
        empty(rows if return_lse else (0,)),
        empty(rows if return_logprobs else (0,)),
        empty((2 * math.prod(rows) + (2 if reduced else 0),)),
        empty(hidden.shape if fused and grad_hidden else (0,)),
        _fake_weight_gradient(hidden, weight) if fused and grad_weight else empty(0),
        empty(weight.shape[:1] if fused and grad_bias else (0,)),
    )


def _fake_weight_gradient(hidden: Tensor, weight: Tensor) -> Tensor:
    """Float32 (float64 for float64), but rounded already where it is of bfloat16."""
    rounded = hidden.dtype == torch.bfloat16
    return weight.new_empty(
        weight.shape, dtype=hidden.dtype if rounded else accumulate_dtype(hidden)
    )


def _fake_backward(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    grad_logprobs: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_hidden, grad_weight, grad_bias, _ = rest[-4:]

    def empty(shape: Any) -> Tensor:
        return hidden.new_empty(shape, dtype=accumulate_dtype(hidden))

    return (
        empty(hidden.shape if grad_hidden else (0,)),
        _fake_weight_gradient(hidden, weight) if grad_weight else empty(0),
        empty(weight.shape[:1] if grad_bias else (0,)),
    )


def _fake_state(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty((5, math.prod(hidden.shape[:-1])), dtype=accumulate_dtype(hidden))


# ---------------------------------------------------------------- gradients


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient as eager code takes it.

    Gradients made in the forward pass are kept beside the graph and given away, scaled in place,
    by the first backward: no second copy of them ever exists, and none that autograd has taken
    as `.grad` is still ours to change. A second backward through the same graph makes them anew.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, lse, logprobs, saved, *made = _registry.active.linear_cross_entropy_forward(*inputs)
        _setup(ctx, inputs, (loss, lse, logprobs, saved))
        ctx.made = made if ctx.fused else None
        return loss, lse, logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        made, ctx.made = ctx.made, None
        (grad_loss, _, _) = grads
        if made is None or torch.is_grad_enabled() or grad_loss is None:
            return _backward(ctx, *grads)
        tensors = ctx.saved_tensors[:4]
        if is_batched(grad_loss):  # many factors, for which there is no place
            made = [grad * grad_loss for grad in made]
        # On the CPU a factor of 1 is seen and costs no pass over the gradients; a fake's is not.
        elif type(grad_loss) is not Tensor or not grad_loss.is_cpu or grad_loss.item() != 1:
            made = [grad.mul_(grad_loss) for grad in made]
        return _in_place_of_inputs(made, tensors, ctx.grads)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, bias, class_weight, *options = inputs
    *ctx.options, return_lse, return_logprobs, grad_h, grad_w, grad_b, ctx.chunk_bytes = options
    ctx.grads = (grad_h, grad_w, grad_b)
    _, lse, logprobs, saved, *made = output
    reduced = ctx.options[1] != REDUCTIONS["none"]
    ctx.fused = reduced and not return_lse and not return_logprobs
    ctx.ops = _registry.active
    ctx.save_for_backward(hidden, weight, target, bias, class_weight, saved, *made)
    unused = [t for t, wanted in ((lse, return_lse), (logprobs, return_logprobs)) if not wanted]
    ctx.mark_non_differentiable(*unused, *((saved, *made) if made else ()))
    ctx.set_materialize_grads(False)


def _in_place_of_inputs(
    grads: Any, tensors: tuple[Tensor | None, ...], wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias, in their dtypes, among those of all 16 inputs."""
    hidden, weight, _, bias = tensors
    dhidden, dweight, dbias = (
        grad.to(t.dtype) if want and t is not None else None
        for grad, t, want in zip(grads, (hidden, weight, bias), wanted, strict=True)
    )
    return dhidden, dweight, None, dbias, *(None,) * 12


def _backward(
    ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, grad_logprobs: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden, weight, target, bias, class_weight, saved, *_ = ctx.saved_tensors
    upstream = (grad_loss, grad_lse, grad_logprobs)
    whole = (0, 0)  # first_class, num_classes: weight is the whole vocabulary
    op = partial(
        ctx.ops.linear_cross_entropy_backward,
        *(*upstream, hidden, weight, target, bias, class_weight, saved),
        *(*ctx.options, *whole, *ctx.grads, ctx.chunk_bytes),
    )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        inputs = (hidden, weight, bias, target, class_weight)
        plain = partial(_plain, options=ctx.options)
        wanted = [i if wants else None for i, wants in enumerate(ctx.grads)]
        made = differentiable_backward(op, plain, wanted, upstream, inputs)
    else:
        made = op()
    return _in_place_of_inputs(made, (hidden, weight, target, bias), ctx.grads)


def _plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    *,
    options: list[Any],
) -> tuple[Tensor, ...]:
    """The reference, in the precision of the kernels."""
    ignore_index, reduction, *others = options
    acc = accumulate_dtype(hidden)
    return reference.linear_cross_entropy(
        hidden.to(acc),
        weight.to(acc),
        target,
        None if bias is None else bias.to(acc),
        class_weight,
        ignore_index,
        REDUCTION_NAMES[reduction],
        *others,
    )


@_registry.registration
def register(namespace: str) -> None:
    """Add fakes and gradients to the ops of `namespace`."""
    for name in ("linear_cross_entropy", "linear_cross_entropy_forward"):
        register_fake(namespace, name, _fake)
    register_fake(namespace, "linear_cross_entropy_backward", _fake_backward)
    register_fake(namespace, "linear_cross_entropy_state", _fake_state)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        _setup(ctx, inputs, output)
        ctx.ops = getattr(torch.ops, namespace)

    def backward(ctx: Any, grad_loss: Any, grad_lse: Any, grad_logprobs: Any, *_: Any) -> Any:
        if not ctx.fused or grad_loss is None or torch.is_grad_enabled():
            return _backward(ctx, grad_loss, grad_lse, grad_logprobs)
        tensors = ctx.saved_tensors
        # Outputs of the op, which a graph may be run through again: never scaled in place.
        made = [grad * grad_loss for grad in tensors[6:]]
        return _in_place_of_inputs(made, tensors[:4], ctx.grads)

    torch.library.register_autograd(
        f"{namespace}::linear_cross_entropy", backward, setup_context=setup
    )
