"""All blocks of a pre-norm transformer for the new tokens of a decoding step, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqkern.ops import _registry
from seqkern.ops._fakes import check_shape, register_fake
from seqkern.ops.linear_step import ACTIVATIONS


def decoder_step(
    x: Tensor,
    parameters: Sequence[Tensor],
    cache: Tensor,
    lengths: Tensor,
    *,
    eps: float = 1e-5,
    activation: str | None = "gelu",
    counters: Tensor | None = None,
) -> Tensor:
    r"""The residual stream above the last block, for S new tokens per row.

    Each block is

    .. math:: x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x)), \qquad
        x \leftarrow x + \mathrm{act}(\mathrm{norm}(x) W_1^\top + b_1) W_2^\top + b_2

    with layer norms and causal attention over the tokens in the cache, which the new ones join: the
    kernels of `linear_step` and `attention_step`, without a call from Python for each.

    Args:
        x: [B, S, C], the embedded tokens; S from 1 to 16; float32, float64, float16 or bfloat16.
        parameters: twelve for each block, in this order: weight and bias of the attention's norm;
            of the product that makes q, k and v, [3 C, C]; of the one that mixes the heads; of
            the MLP's norm; of its two layers. Of x's dtype, or bfloat16 or float16 with a
            float32 x.
        cache: [layers, 2, B, NH, L, D], as `seqkern.nn.KVCache.memory`, in one of those dtypes.
        lengths: int64 [B], how many tokens each row's cache holds. It is not changed.
        eps: of the norms.
        activation: of the MLP, as of `linear_step`.
        counters: as of `attention_step`.

    Returns:
        [B, S, C], of x's dtype. There are no gradients.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, or gradients needed.

    Source: docs/math/linear_step.md, docs/math/attention_step.md.

    Example:
        >>> model = seqkern.models.GPT(seqkern.models.GPTConfig(10, hidden=8, heads=2))
        >>> x, cache = torch.randn(1, 1, 8), model.empty_cache(1)
        >>> with torch.no_grad():
        ...     parameters = list(model.blocks.parameters())
        ...     seqkern.ops.decoder_step(x, parameters, cache.memory, cache.lengths).shape
        torch.Size([1, 1, 8])
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)):
        raise ValueError(
            "decoder_step: no argument must need gradients; "
            "use torch.no_grad(), or the modules' forward to train"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"decoder_step: activation must be one of {list(ACTIVATIONS)}, got {activation!r}"
        )
    y: Tensor = _registry.call(
        _registry.active.decoder_step,
        x,
        parameters,
        cache,
        lengths,
        counters,
        eps,
        ACTIVATIONS[activation],
    )
    return y


def _fake(x: Tensor, parameters: Any, cache: Tensor, lengths: Tensor, *_: Any) -> Tensor:
    check_shape("decoder_step", "cache", cache, (None, 2, x.shape[0], None, None, None))
    check_shape("decoder_step", "lengths", lengths, x.shape[:1])
    return x.new_empty(x.shape)


@_registry.registration
def register(namespace: str) -> None:
    """Add the fake."""
    register_fake(namespace, "decoder_step", _fake)
