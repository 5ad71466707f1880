"""Causal attention in plain PyTorch, with every score stored."""

from __future__ import annotations

import torch
from torch import Tensor

_UINT32 = 0xFFFFFFFF


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, NH, Tq, D] and log-sum-exp [B, NH, Tq] as `seqkern.ops.causal_attention` defines
    them.
    """
    B, NH, Tq, D = q.shape
    NKV, Tk = k.shape[1:3]
    seen = visible(B, Tq, Tk, window, lengths, cu_seqlens, q.device)[:, None]  # [B, 1, Tq, Tk]
    any_seen = seen.any(-1)  # [B, 1, Tq]
    # What nobody reads may be anything, NaN among it, and a gradient of zero times NaN is NaN: it
    # is overwritten before anything is computed with it.
    q = q.masked_fill(~any_seen[..., None], 0.0)
    k, v = (x.masked_fill(~seen.any(-2)[..., None], 0.0) for x in (k, v))  # seen: [B, 1, Tk]
    k = k.repeat_interleave(NH // NKV, dim=1)  # [B, NH, Tk, D]
    v = v.repeat_interleave(NH // NKV, dim=1)  # [B, NH, Tk, D]
    s = (q @ k.transpose(-1, -2)) * (D**-0.5 if scale is None else scale)  # [B, NH, Tq, Tk]
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    p = torch.arange(Tk - Tq, Tk, device=q.device)[:, None]  # [Tq, 1] positions of the queries
    j = torch.arange(Tk, device=q.device)  # [Tk]
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(s.dtype).reshape(-1, NH, 1, 1) * (p - j).to(s.dtype)
    # A row that sees nothing gets finite scores here and zeros below: derivatives of a softmax over
    # minus infinities would be NaN.
    s = s.masked_fill(~seen & any_seen[..., None], -torch.inf)
    s = s.masked_fill(~any_seen[..., None], 0.0)
    lse = torch.logsumexp(s, -1)  # [B, NH, Tq]
    weights = s.softmax(-1).masked_fill(~any_seen[..., None], 0.0)
    if dropout_p > 0:
        assert dropout_seed is not None
        keep = dropout_keep(dropout_seed, dropout_p, B, NH, Tq, Tk)
        weights = weights * keep / (1 - dropout_p)
    out = (weights @ v).masked_fill(~any_seen[..., None], 0.0)
    return out, lse.masked_fill(~any_seen, -torch.inf)


def visible(
    B: int,
    Tq: int,
    Tk: int,
    window: int | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Bool [B or 1, Tq, Tk]: which keys a query sees."""
    p = torch.arange(Tk - Tq, Tk, device=device)[:, None]
    j = torch.arange(Tk, device=device)
    seen = j <= p  # [Tq, Tk]
    if window is not None:
        seen = seen & (j > p - window)
    if cu_seqlens is not None:
        segment = torch.searchsorted(cu_seqlens, j, right=True)  # [Tk], 1 .. S inside a sequence
        inside = (segment > 0) & (segment < cu_seqlens.numel())
        seen = seen & (segment[:, None] == segment) & inside
    seen = seen[None]
    if lengths is not None:
        length = lengths[:, None, None]
        seen = seen & (j < length) & (p < length)
    return seen


def dropout_keep(seed: Tensor, dropout_p: float, B: int, NH: int, Tq: int, Tk: int) -> Tensor:
    """Bool [B, NH, Tq, Tk]: the weights that dropout keeps."""
    device = seed.device
    row = torch.arange(B * NH, device=device).reshape(B, NH, 1, 1)
    i = torch.arange(Tq, device=device)[:, None]
    block = torch.arange((Tk + 3) // 4, device=device)
    words = philox(seed, block, i, row & _UINT32, row >> 32)
    bits = torch.stack(words, -1).flatten(-2)[..., :Tk]  # [B, NH, Tq, Tk]
    return bits >= int(dropout_p * 2.0**32)


def philox(key: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011) of a 64-bit key and counters of four 32-bit words, all
    int64; the result is four words in [0, 2^32).

    Products wrap in int64; their low and high words are those of the unsigned product all the same.
    """
    key0, key1 = key & _UINT32, (key >> 32) & _UINT32
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        high0, high1 = (product0 >> 32) & _UINT32, (product1 >> 32) & _UINT32
        c0, c1, c2, c3 = (
            high1 ^ c1 ^ key0,
            product1 & _UINT32,
            high0 ^ c3 ^ key1,
            product0 & _UINT32,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _UINT32, (key1 + 0xBB67AE85) & _UINT32
    words = torch.broadcast_tensors(c0, c1, c2, c3)  # type: ignore[no-untyped-call]
    return tuple(words)
