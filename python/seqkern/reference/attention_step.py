"""One step of attention with a cache, as docs/math/attention_step.md defines it."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding of the first R elements of x [B, heads, S, D]; cos, sin [B, S, R / 2]."""
    half = cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # [B, 1, S, R / 2]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = (first * cos - second * sin, second * cos + first * sin)
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((out, rest), -1)


def attention_step(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_interleaved: bool = False,
) -> Tensor:
    """Output [B, NH, S, D]; k_cache and v_cache are written. Arguments as of the op."""
    NH, S, D = q.shape[1:]
    NKV, L = k_cache.shape[1:3]
    p = positions[:, None] + torch.arange(S, device=q.device)  # [B, S]
    if rotary is not None:
        cos, sin = (table[p] for table in rotary)  # [B, S, R / 2]
        q, k_new = (rotate(x, cos, sin, rotary_interleaved) for x in (q, k_new))
    row = torch.arange(q.shape[0], device=q.device)[:, None]
    k_cache[row, :, p] = k_new.transpose(1, 2).to(k_cache.dtype)
    v_cache[row, :, p] = v_new.transpose(1, 2).to(v_cache.dtype)
    k, v = (c.to(q.dtype).repeat_interleave(NH // NKV, dim=1) for c in (k_cache, v_cache))
    x = (q @ k.transpose(2, 3)) * (D**-0.5 if scale is None else scale)  # [B, NH, S, L]
    if softcap > 0:
        x = softcap * torch.tanh(x / softcap)
    j = torch.arange(L, device=q.device)
    seen = j <= p[:, None, :, None]  # [B, 1, S, L]
    if window is not None:
        seen = seen & (j > p[:, None, :, None] - window)
    x = x.masked_fill(~seen, -torch.inf)
    # What lies in the cache beyond a row's tokens may be anything, NaN among it.
    unseen = ~seen.any(2)[..., None]  # [B, 1, L, 1]
    return x.softmax(-1) @ v.masked_fill(unseen, 0.0)
