"""The linear layer of a decoding step, with the norm before it and what follows, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqkern.ops import _registry
from seqkern.ops._fakes import check_shape, register_fake
from seqkern.ops._mistakes import checked, describe

_NORMS = {None: 0, "layer_norm": 1, "rms_norm": 2}
#: By name; decoder_step has the same.
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "relu": 4}


def _diagnosis(error: Exception, x: Tensor, **_: Any) -> Exception | None:
    if x.dim() and x.shape[-1] == 0:
        return ValueError(
            "linear_step: x must have at least one element in its last dimension, "
            f"got {describe(x)}"
        )
    return None


@checked("linear_step", _diagnosis)
def linear_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    r"""A linear layer of few rows, whose cost is one read of its weight.

    .. math:: y = \mathrm{residual} + \mathrm{act}(\mathrm{norm}(x) W^\top + b)

    Gated, with :math:`W` and :math:`b` of 2 M rows, the first half the gate:

    .. math:: y = \mathrm{residual} + \mathrm{act}(z W_1^\top + b_1) \odot (z W_2^\top + b_2),
        \quad z = \mathrm{norm}(x)

    Everything between x and y is in float32 (float64 for float64), whatever the weight holds. For
    decoding: a row's result does not depend on the rows beside it, however many they are, where a
    matrix product's may. From some hundred rows on `torch.nn.functional.linear` is faster.

    Args:
        x: [..., K], float32, float64, float16 or bfloat16.
        weight: [M, K], gated [2 M, K], of x's dtype, or bfloat16 or float16 with a float32 x; its
            last dimension contiguous.
        bias: [M], gated [2 M], of the weight's dtype, as the two parameters of the norm.
        norm: of x, over K: None, "layer_norm" or "rms_norm".
        norm_weight: [K]; None for ones.
        norm_bias: [K], of a layer norm; None for zeros.
        eps: is added to the norm's mean square.
        activation: None, "gelu", "gelu_tanh", "silu" or "relu".
        gated: multiply by a second half of the product, as above.
        residual: [..., M], of x's dtype.

    Returns:
        [..., M], of x's dtype. There are no gradients: training is `torch.nn.functional.linear`'s.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, or gradients needed.

    Source: docs/math/linear_step.md.

    Example:
        >>> x, weight = torch.randn(1, 8), torch.randn(32, 8)
        >>> seqkern.ops.linear_step(x, weight, norm="rms_norm", activation="gelu").shape
        torch.Size([1, 32])
    """
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad
        for t in (x, weight, bias, norm_weight, norm_bias, residual)
    ):
        raise ValueError(
            "linear_step: no argument must need gradients; "
            "use torch.no_grad(), or torch.nn.functional.linear to train"
        )
    if norm not in _NORMS:
        raise ValueError(f"linear_step: norm must be one of {list(_NORMS)}, got {norm!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"linear_step: activation must be one of {list(ACTIVATIONS)}, got {activation!r}"
        )
    y: Tensor = _registry.call(
        _registry.active.linear_step,
        x,
        weight,
        bias,
        _NORMS[norm],
        norm_weight,
        norm_bias,
        eps,
        ACTIVATIONS[activation],
        gated,
        residual,
    )
    return y


def _fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    bias, gated, residual = args[0], args[6], args[7]
    check_shape("linear_step", "weight", weight, (None, x.shape[-1]))
    check_shape("linear_step", "bias", bias, weight.shape[:1])
    M = weight.shape[0] // 2 if gated else weight.shape[0]
    check_shape("linear_step", "residual", residual, (*x.shape[:-1], M))
    return x.new_empty(*x.shape[:-1], M)


@_registry.registration
def register(namespace: str) -> None:
    """Add the fake."""
    register_fake(namespace, "linear_step", _fake)
