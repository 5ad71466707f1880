"""Attention of new tokens over a cache of keys and values, which they join in the same call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from seqkern.ops import _registry
from seqkern.ops._autocast import is_casting
from seqkern.ops._fakes import check_shape, register_fake
from seqkern.ops._mistakes import checked, describe

#: New tokens per row that a step takes at most.
MAX_STEP_TOKENS = 16


def _diagnosis(error: Exception, **given: Any) -> Exception | None:
    """Of what Python itself stumbles over before the kernels' torch layer looks at shapes."""
    for name in ("q", "k_new", "v_new", "k_cache", "v_cache"):
        if given[name].dim() != 4:
            axes = {"q": "B, NH, S, D", "k_new": "B, NKV, S, D", "v_new": "B, NKV, S, D"}
            expected = axes.get(name, "B, NKV, L, D")
            return ValueError(
                f"attention_step: {name} must be [{expected}], got {describe(given[name])}"
            )
    if isinstance(error, ZeroDivisionError):
        q = describe(given["q"])
        return ValueError(f"attention_step: q must have a head width from 1 to 256, got {q}")
    return None


@checked("attention_step", _diagnosis)
def attention_step(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_interleaved: bool = False,
    counters: Tensor | None = None,
) -> Tensor:
    r"""Store the keys and values of S new tokens per row, and attend over all the row has.

    Token s of row b stands at :math:`p = \mathrm{positions}_b + s`. Its key and value are written
    to the caches there, and its query sees the cached keys :math:`j \le p`:

    .. math:: \mathrm{out} = \sum_j \mathrm{softmax}_j(\mathrm{scale}\; q \cdot k_j)\, v_j

    Query head h reads key head h // (NH / NKV). Rows may have different numbers of tokens.
    `seqkern.nn.KVCache` holds caches, positions and counters of a model. Under autocast new tokens
    are cast to the dtype of the caches, where they are not float32 alone.

    Args:
        q: [B, NH, S, D], float32, float64, float16 or bfloat16; S from 1 to 16, D to 256. Any
            strides with a contiguous last dimension, here and in the next four.
        k_new: [B, NKV, S, D], NH a multiple of NKV.
        v_new: [B, NKV, S, D].
        k_cache: [B, NKV, L, D], L at least S, of q's dtype, or bfloat16 or float16 with a float32
            q. Written at the new tokens' positions, which autograd counts as a change in place;
            what lies beyond them is not read.
        v_cache: [B, NKV, L, D], likewise, in other memory.
        positions: int64 [B], how many tokens each row's cache holds. It is not changed.
        scale: 1 / sqrt(D) if None.
        window: keys a query sees at most, its own among them; None for all.
        softcap: bound c of the products, as c tanh(x / c); 0 for none.
        rotary: (cos, sin), float32 [at least L, R / 2]: the first R elements of q and k_new are
            rotated by the angle of their position (Su et al. 2021) before anything else.
        rotary_interleaved: pairs are neighbours (2 i, 2 i + 1); else (i, i + R / 2).
        counters: int32 [B * NKV] of zeros, zero again afterwards; on CUDA saves a launch. Calls on
            streams that run at once need counters of their own.

    Returns:
        [B, NH, S, D], laid out as [B, S, NH, D], which an output projection reads. There are no
        gradients: training and prefill are `seqkern.ops.causal_attention`'s.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit; on the CPU also positions
            beyond the cache. On CUDA a token that does not fit is not stored, and its output is
            NaN.

    Source: docs/math/attention_step.md.

    Example:
        >>> k_cache, v_cache = torch.zeros(2, 1, 2, 100, 64)
        >>> q, k, v = torch.randn(1, 8, 1, 64), *torch.randn(2, 1, 2, 1, 64)
        >>> seqkern.ops.attention_step(q, k, v, k_cache, v_cache, torch.tensor([0])).shape
        torch.Size([1, 8, 1, 64])
    """
    if torch.is_grad_enabled() and (
        q.requires_grad
        or k_new.requires_grad
        or v_new.requires_grad
        or k_cache.requires_grad
        or v_cache.requires_grad
    ):
        raise ValueError(
            "attention_step: q, k_new, v_new and the caches must not need gradients; "
            "use torch.no_grad(), or causal_attention to train"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention_step: window must be at least 1 or None, got {window}")
    if scale is not None and scale != scale:
        raise ValueError(f"attention_step: scale must be a number, got {scale}")
    if is_casting(q):
        q, k_new, v_new = _like_cache(k_cache, q, k_new, v_new)
    is_eager = not torch.compiler.is_compiling()
    if is_eager:
        _check_memory(k_cache, v_cache)
        if counters is not None and q.is_cpu:
            B, NKV, _, _ = k_cache.shape
            check_counters("attention_step", counters, B * NKV)
    cos, sin = rotary if rotary is not None else (None, None)
    out: Tensor = _registry.call(
        _registry.active.attention_step,
        q,
        k_new,
        v_new,
        k_cache,
        v_cache,
        positions,
        cos,
        sin,
        rotary_interleaved,
        q.shape[-1] ** -0.5 if scale is None else scale,
        window or 0,
        softcap,
        counters,
    )
    if is_eager:  # compiled programs count it themselves: the op's schema says what it writes
        increment_version((k_cache, v_cache))
    return out


def _like_cache(cache: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast made of new tokens, in the dtype of the cache they join."""
    if {t.dtype for t in tensors} == {torch.float32}:  # over a 16-bit cache, too
        return tensors
    return tuple(t.to(cache.dtype) for t in tensors)


def _check_memory(k_cache: Tensor, v_cache: Tensor) -> None:
    """Each element of the caches has a place of its own."""
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        check_places("attention_step", "k_cache", k_cache)
        check_places("attention_step", "v_cache", v_cache)
    if k_cache.storage_offset() == v_cache.storage_offset() and (
        # Fakes have no memory, and one that is asked for its address warns.
        (k_cache is v_cache and k_cache.numel() > 0)
        or (type(k_cache) is Tensor and k_cache.data_ptr() == v_cache.data_ptr() != 0)
    ):
        raise ValueError(
            "attention_step: v_cache must be other memory than k_cache, got the same tensor"
        )


def check_places(op: str, name: str, cache: Tensor) -> None:
    """Refuse an expanded cache, whose rows would overwrite one another."""
    if any(
        size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True)
    ):
        raise ValueError(
            f"{op}: {name} must have memory for each of its elements, got an expanded tensor "
            f"{describe(cache)} of strides {list(cache.stride())}"
        )


def check_counters(op: str, counters: Tensor, count: int) -> None:
    """What the GPU's kernels need of them, asked for also where the CPU's need none."""
    if (
        counters.dtype is not torch.int32
        or not counters.is_contiguous()
        or counters.numel() < count
        or not counters.is_cpu
    ):
        raise ValueError(
            f"{op}: counters must be contiguous int32 with at least {count} elements, all zero, "
            f"on the CPU like q, got {describe(counters)} on {counters.device}"
        )


def _fake(
    q: Tensor, k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any
) -> Tensor:
    B, NH, S, D = q.shape
    check_shape("attention_step", "k_new", k_new, (B, None, S, D))
    check_shape("attention_step", "v_new", v_new, k_new.shape)
    check_shape("attention_step", "k_cache", k_cache, (B, k_new.shape[1], None, D))
    check_shape("attention_step", "v_cache", v_cache, k_cache.shape)
    check_shape("attention_step", "positions", rest[0], (B,))
    return q.new_empty(B, S, NH, D).transpose(1, 2)


@_registry.registration
def register(namespace: str) -> None:
    """Add the fake."""
    register_fake(namespace, "attention_step", _fake)
