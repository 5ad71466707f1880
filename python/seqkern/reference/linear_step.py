"""The linear layer of a decoding step in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


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
    """`seqkern.ops.linear_step`, operation by operation; all tensors of one dtype."""
    if norm == "layer_norm":
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    elif norm == "rms_norm":
        x = F.rms_norm(x, x.shape[-1:], norm_weight, eps)
    y = F.linear(x, weight, bias)  # [..., M], gated [..., 2 M]
    up = None
    if gated:
        y, up = y.chunk(2, dim=-1)  # [..., M] each
    if activation in ("gelu", "gelu_tanh"):
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    elif activation == "silu":
        y = F.silu(y)
    elif activation == "relu":
        y = F.relu(y)
    if up is not None:
        y = y * up
    return y if residual is None else residual + y
