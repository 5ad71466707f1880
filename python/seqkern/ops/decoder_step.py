"""All blocks of a pre-norm transformer for the new tokens of a decoding step, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from seqkern.ops import _registry
from seqkern.ops._fakes import check_shape, register_fake
from seqkern.ops._mistakes import checked, describe, dtype_name
from seqkern.ops.attention_step import MAX_STEP_TOKENS, check_counters, check_places
from seqkern.ops.linear_step import ACTIVATIONS


def decoder_step(
    x: Tensor,
    parameters: Iterable[Tensor],
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
            Written in place, which autograd counts.
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
    if not isinstance(parameters, list | tuple | Tensor) and isinstance(parameters, Iterable):
        parameters = tuple(parameters)  # what `module.parameters()` returns can be read once
    return _decoder_step(x, parameters, cache, lengths, eps, activation, counters)  # type: ignore[arg-type]


_OF_BLOCK = 12  # parameters
_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _diagnosis(error: Exception, **given: Any) -> Exception | None:
    """What the steps inside say of their arguments, said of those of the whole."""
    if str(error).startswith("decoder_step: "):
        return None
    found = next(_mistakes(**given), None)
    return None if found is None else ValueError(f"decoder_step: {found}")


def _mistakes(
    x: Tensor,
    parameters: Sequence[Tensor],
    cache: Tensor,
    lengths: Tensor,
    eps: float,
    **_: Any,
) -> Iterator[str]:
    if x.dim() != 3:
        yield f"x must be [B, S, C], got {describe(x)}"
        return
    B, S, C = x.shape
    dtypes: tuple[torch.dtype, ...] = (x.dtype,)
    if x.dtype not in _FLOATING:
        yield f"x must be float32, float64, float16 or bfloat16, got {describe(x)}"
    if x.dtype == torch.float32:
        dtypes = (x.dtype, torch.bfloat16, torch.float16)
    names = " or ".join(map(dtype_name, dtypes))
    if not 1 <= S <= MAX_STEP_TOKENS:
        yield f"x must hold 1 to {MAX_STEP_TOKENS} new tokens, got {describe(x)}"
    if cache.dim() != 6:
        yield f"cache must be [layers, 2, {B}, NH, L, D] with NH D = {C}, got {describe(cache)}"
    else:
        L, D = cache.shape[4:]
        if cache.dtype not in dtypes:
            yield f"cache must be {names} with x {dtype_name(x.dtype)}, got {describe(cache)}"
        if not 1 <= D <= 256:
            yield f"cache must have a head width from 1 to 256, got {describe(cache)}"
        if L < S:
            yield f"cache must hold at least the {S} new tokens, got {describe(cache)}"
        if D > 1 and cache.stride(5) != 1:
            yield f"cache must have stride 1 in its last dimension, got {cache.stride(5)}"
    if lengths.dtype != torch.int64 or tuple(lengths.shape) != (B,):
        yield f"lengths must be int64 [{B}], got {describe(lengths)}"
    if not eps >= 0:
        yield f"eps must be at least 0, got {eps}"
    for n, t in enumerate(parameters):
        yield from _parameter_mistakes(n, t, parameters, C, dtypes, names)
    for name, t in (
        ("cache", cache),
        ("lengths", lengths),
        *((f"parameters[{n}]", t) for n, t in enumerate(parameters)),
    ):
        if t.device != x.device:
            yield f"{name} must be on the device of x, {x.device}, got {t.device}"
    if lengths.is_cpu and cache.dim() == 6:
        for row, length in enumerate(lengths.tolist()):
            if not 0 <= length <= cache.shape[4] - S:
                yield (
                    f"lengths must be in [0, {cache.shape[4] - S}] for {S} new tokens in a cache "
                    f"of {cache.shape[4]}, got {length} for row {row}"
                )


def _parameter_mistakes(
    n: int,
    t: Tensor,
    parameters: Sequence[Tensor],
    C: int,
    dtypes: tuple[torch.dtype, ...],
    names: str,
) -> Iterator[str]:
    """Of parameter n, whose block and place in it decide what it must be."""
    place = n % _OF_BLOCK
    weights = parameters[n - place : n - place + _OF_BLOCK]
    wide = weights[8].shape[0] if len(weights) == _OF_BLOCK and weights[8].dim() else 0
    shape = {2: (3 * C, C), 3: (3 * C,), 4: (C, C), 8: (wide, C), 9: (wide,), 10: (C, wide)}
    expected = shape.get(place, (C,))
    if tuple(t.shape) != expected:
        yield f"parameters[{n}] must be {list(expected)}, got {describe(t)}"
    if t.dtype not in dtypes:
        yield f"parameters[{n}] must be {names}, got {describe(t)}"
    # A norm and a bias have the dtype of the weight of their product.
    product = n - place + (2, 2, 2, 2, 4, 4, 8, 8, 8, 8, 10, 10)[place]
    if product < len(parameters) and t.dtype != parameters[product].dtype:
        yield (
            f"parameters[{n}] must have the dtype of parameters[{product}], "
            f"{dtype_name(parameters[product].dtype)}, got {describe(t)}"
        )
    if t.dim() == 2 and t.shape[1] > 1 and t.stride(1) != 1:
        yield (f"parameters[{n}] must have stride 1 in its last dimension, got {t.stride(1)}")


@checked("decoder_step", _diagnosis)
def _decoder_step(
    x: Tensor,
    parameters: Sequence[Tensor],
    cache: Tensor,
    lengths: Tensor,
    eps: float,
    activation: str | None,
    counters: Tensor | None,
) -> Tensor:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters, cache)):
        raise ValueError(
            "decoder_step: no argument must need gradients; "
            "use torch.no_grad(), or the modules' forward to train"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"decoder_step: activation must be one of {list(ACTIVATIONS)}, got {activation!r}"
        )
    if not torch.compiler.is_compiling():
        if not cache.is_contiguous():
            check_places("decoder_step", "cache", cache)
        if counters is not None and x.is_cpu:
            _, _, B, NH, _, _ = cache.shape
            check_counters("decoder_step", counters, B * NH)
        # Before the call, as one that fails may have stored tokens of some layers.
        increment_version(cache)
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
