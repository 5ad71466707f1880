"""The cache of keys and values that generation fills token by token."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, each row of the batch at its own length.

    The memory is taken once, so a step allocates nothing and can be captured in a CUDA graph. A
    layer stores its new tokens with `seqkern.ops.attention_step(q, k_new, v_new, *cache[layer],
    cache.lengths, counters=cache.counters)`; after the last layer, `advance` counts them.

    Args:
        layers: number of layers.
        batch: B, rows.
        kv_heads: NKV, key heads per layer.
        capacity: L, tokens a row holds at most.
        head_width: D.
        dtype: of keys and values; bfloat16 or float16 halve the memory of a float32 model's.
        device: where they lie.

    Raises:
        ValueError: a size below 1.

    Example:
        >>> cache = KVCache(layers=2, batch=1, kv_heads=4, capacity=128, head_width=64)
        >>> k, v = cache[0]
        >>> k.shape
        torch.Size([1, 4, 128, 64])
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_width: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """See the class."""
        sizes = {
            "layers": layers,
            "batch": batch,
            "kv_heads": kv_heads,
            "capacity": capacity,
            "head_width": head_width,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"KVCache: {name} must be at least 1, got {size}")
        shape = (layers, 2, batch, kv_heads, capacity, head_width)
        self.memory = torch.zeros(shape, dtype=dtype, device=device)  # [layers, 2, B, NKV, L, D]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)  # [B] tokens held
        self.counters = torch.zeros(batch * kv_heads, dtype=torch.int32, device=device)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each [B, NKV, L, D]."""
        k, v = self.memory[layer]
        return k, v

    def __len__(self) -> int:
        """Number of layers."""
        return self.memory.shape[0]

    @property
    def capacity(self) -> int:
        """L, tokens a row holds at most."""
        return self.memory.shape[4]

    def advance(self, tokens: int | Tensor) -> None:
        """Count new tokens of each row: a number, or [B] where rows accepted different ones."""
        self.lengths += tokens

    def truncate(self, lengths: int | Tensor) -> None:
        """Forget the tokens of each row from `lengths` on (a number or [B]), as 0 to start anew."""
        self.lengths.clamp_(max=torch.as_tensor(lengths, device=self.lengths.device))

    def reorder(self, rows: Tensor) -> None:
        """Make row b what row rows[b] is, int64 [any]: beams that survive, rows that go on."""
        self.memory = self.memory.index_select(2, rows)
        self.lengths = self.lengths.index_select(0, rows)
        self.counters = self.counters.new_zeros(self.memory.shape[2] * self.memory.shape[3])
