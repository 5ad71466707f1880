"""Transformer blocks that read both ways or read another sequence, for rows of different lengths.

Attention of an element to later ones has no kernel of ours: it is PyTorch's
`scaled_dot_product_attention` with the padding masked. Causal attention is ours.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.models.backends import Layers
from seqkern.nn import KVCache


class Memory(NamedTuple):
    """What attention reads of a sequence."""

    keys: Tensor  # [B, NH, S, D]
    values: Tensor  # [B, NH, S, D]
    valid: Tensor  # bool [B, S], the elements that exist


def positions(start: int, T: int, C: int, like: Tensor) -> Tensor:
    """Sines and cosines [T, C] of positions start .. start + T - 1, without a longest one.

    Vaswani et al. 2017: wavelengths from 2 pi to 10000 * 2 pi, sines first.
    """
    # Whatever torch's default dtype is: in 16 bits neighbouring positions would be the same.
    exact = torch.promote_types(like.dtype, torch.float32)
    rates = torch.exp(
        torch.arange(0, C, 2, dtype=exact, device=like.device) * (-math.log(10000) / C)
    )
    places = torch.arange(start, start + T, dtype=exact, device=like.device)
    angles = places[:, None] * rates  # [T, C / 2]
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :C].to(like.dtype)


def step_attention(
    layers: Layers, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int
) -> Tensor:
    """Attention [B, NH, S, D] of new tokens to a layer's cache, which they join."""
    assert layers.attention_step is not None
    return layers.attention_step(q, k, v, *cache[layer], cache.lengths, counters=cache.counters)


class Attention(nn.Module):
    """Multi-head attention with separate projections, as self- and cross-attention need them."""

    def __init__(self, C: int, memory: int, heads: int, dropout: float, layers: Layers) -> None:
        """Queries from width C, keys and values from width `memory`."""
        super().__init__()
        self.heads, self.dropout, self.layers = heads, dropout, layers
        self.q = nn.Linear(C, C)
        self.kv = nn.Linear(memory, 2 * C)
        self.out = nn.Linear(C, C)

    def memory(self, x: Tensor, valid: Tensor) -> Memory:
        """What queries read of x [B, S, M]."""
        return Memory(*self._keys(x), valid)

    def masked(self, x: Tensor, memory: Memory) -> Tensor:
        """[B, T, C] reads all of a memory that exists."""
        keys, values, valid = memory
        y = F.scaled_dot_product_attention(
            self._queries(x),
            keys,
            values,
            attn_mask=valid[:, None, None],
            dropout_p=self._dropout(),
        )
        return self._joined(y)

    def causal(self, x: Tensor, cache: KVCache | None, layer: int, held: int) -> Tensor:
        """[B, T, C] reads itself up to each position; one new token reads and joins a cache."""
        q, (k, v) = self._queries(x), self._keys(x)
        if cache is None:
            return self._joined(self.layers.attention(q, k, v, dropout_p=self._dropout()))
        if self.layers.attention_step is not None:
            return self._joined(step_attention(self.layers, q, k, v, cache, layer))
        keys, values = cache[layer]
        keys[:, :, held], values[:, :, held] = k[:, :, 0], v[:, :, 0]
        kept = slice(held + 1)
        return self._joined(F.scaled_dot_product_attention(q, keys[:, :, kept], values[:, :, kept]))

    def _keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of [B, S, M]."""
        B, S, _ = x.shape
        k, v = self.kv(x).view(B, S, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return k, v  # each [B, NH, S, D]

    def _queries(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q: Tensor = self.q(x).view(B, T, self.heads, -1).transpose(1, 2)  # [B, NH, T, D]
        return q

    def _joined(self, y: Tensor) -> Tensor:
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))  # [B, T, C]
        return out

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0


def _mlp(C: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))


class EncoderBlock(nn.Module):
    """x + attention(norm(x)) over all of the row, then x + MLP(norm(x))."""

    def __init__(self, C: int, heads: int, dropout: float, layers: Layers) -> None:
        """The MLP is four times as wide, with GELU."""
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attention = Attention(C, C, heads, dropout, layers)
        self.mlp = _mlp(C)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        y = self.attention_norm(x)
        x = x + self.dropout(self.attention.masked(y, self.attention.memory(y, valid)))
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out


class DecoderBlock(nn.Module):
    """Causal attention, attention to a memory where there is one, MLP; each pre-norm, residual."""

    def __init__(
        self, C: int, memory: int | None, heads: int, dropout: float, layers: Layers
    ) -> None:
        """`memory`: the memory's width; None where there is none."""
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attention = Attention(C, C, heads, dropout, layers)
        self.cross_norm = self.cross = None
        if memory is not None:
            self.cross_norm = nn.LayerNorm(C)
            self.cross = Attention(C, memory, heads, dropout, layers)
        self.mlp = _mlp(C)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        memory: Memory | None,
        cache: KVCache | None,
        layer: int,
        held: int,
    ) -> Tensor:
        """[B, T, C] to [B, T, C]; with a cache, T is 1 and follows the `held` tokens in it."""
        x = x + self.dropout(self.attention.causal(self.attention_norm(x), cache, layer, held))
        if self.cross is not None:
            assert self.cross_norm is not None
            assert memory is not None
            x = x + self.dropout(self.cross.masked(self.cross_norm(x), memory))
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out
