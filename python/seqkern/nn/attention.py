"""Causal self-attention as a layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from seqkern import ops
from seqkern.ops._mistakes import checked, describe, dtype_name


def _diagnosis(error: Exception, self: CausalSelfAttention, x: Tensor, **_: Any) -> Any:
    weight = self.qkv.weight
    if x.dim() != 3 or x.shape[-1] != self.embed_dim:
        return ValueError(
            f"CausalSelfAttention: x must be [B, T, {self.embed_dim}], got {describe(x)}"
        )
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return ValueError(
            f"CausalSelfAttention: x must be {dtype_name(weight.dtype)} like the weights, "
            f"got {describe(x)}"
        )
    return None


class CausalSelfAttention(torch.nn.Module):
    """Projections to queries, keys and values, `seqkern.ops.causal_attention`, and a projection
    back.

    Grouped-query attention where `num_kv_heads` is less than `num_heads`. Formula, dtypes and
    errors: `seqkern.ops.causal_attention`.

    Args:
        embed_dim: C, the width of input and output.
        num_heads: NH, heads of the queries.
        num_kv_heads: NKV, heads of keys and values; a divisor of NH, NH by default.
        head_dim: D, at most 256; C / NH by default.
        bias: whether the projections have one.
        dropout: probability with which an attention weight is dropped, in training alone.
        window: how many positions a query sees at most, itself among them; None for all.
        softcap: bound of the scores; 0 for none.
        scale: factor of the scores, 1 / sqrt(D) by default.
        device, dtype: of the parameters.

    Shape:
        Input and output [B, T, C]. The projection's weight [(NH + 2 NKV) D, C] holds the rows of
        q, then k, then v.

    Example:
        >>> layer = seqkern.nn.CausalSelfAttention(64, num_heads=8, num_kv_heads=2, window=128)
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    @checked(first=True)
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        window: int | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                "CausalSelfAttention: num_kv_heads must divide num_heads, got "
                f"{num_kv_heads} and {num_heads}"
            )
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                "CausalSelfAttention: embed_dim must be a multiple of num_heads where head_dim is "
                f"not given, got {embed_dim} and {num_heads}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"CausalSelfAttention: dropout must be in [0, 1), got {dropout}")
        if embed_dim < 1:
            raise ValueError(f"CausalSelfAttention: embed_dim must be at least 1, got {embed_dim}")
        width = embed_dim // num_heads if head_dim is None else head_dim
        if not 1 <= width <= 256:
            raise ValueError(f"CausalSelfAttention: head_dim must be from 1 to 256, got {width}")
        if window is not None and window < 1:
            raise ValueError(
                f"CausalSelfAttention: window must be at least 1 or None, got {window}"
            )
        if not 0 <= softcap < math.inf:
            raise ValueError(
                f"CausalSelfAttention: softcap must be at least 0 and finite, got {softcap}"
            )
        if scale is not None and scale != scale:
            raise ValueError(f"CausalSelfAttention: scale must be a number, got {scale}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = width
        self.dropout = dropout
        self.window = window
        self.softcap = softcap
        self.scale = scale
        rows = (num_heads + 2 * num_kv_heads) * self.head_dim
        self.qkv = torch.nn.Linear(embed_dim, rows, bias=bias, device=device, dtype=dtype)
        self.out = torch.nn.Linear(
            num_heads * self.head_dim, embed_dim, bias=bias, device=device, dtype=dtype
        )

    @checked(diagnosis=_diagnosis)
    def forward(
        self, x: Tensor, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """[B, T, C] to [B, T, C].

        With `lengths` [B], positions from a row's length on are padding; with `cu_seqlens`
        [S + 1], x [1, N, C] holds S sequences one after the other.
        """
        B, T, _ = x.shape
        rows = self.num_heads + 2 * self.num_kv_heads
        heads = self.qkv(x).view(B, T, rows, self.head_dim).transpose(1, 2)  # [B, rows, T, D]
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        y = ops.causal_attention(
            q,
            k,
            v,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            dropout_p=self.dropout if self.training else 0.0,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
        )  # [B, NH, T, D]
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out

    def extra_repr(self) -> str:
        """Sizes, and the options that are set."""
        shown = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}
        options = {
            "window": self.window,
            "softcap": self.softcap,
            "dropout": self.dropout,
            "scale": self.scale,
        }
        given = {name: value for name, value in options.items() if value}
        sizes = ", ".join(f"{name}={value}" for name, value in {**shown, **given}.items())
        return f"{self.embed_dim}, {sizes}, head_dim={self.head_dim}"
