"""The cache of keys and values that generation fills token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from seqkern.ops._mistakes import checked, describe, dtype_name

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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
        ValueError: a size below 1, or another dtype than those of floating point.

    Example:
        >>> cache = KVCache(layers=2, batch=1, kv_heads=4, capacity=128, head_width=64)
        >>> k, v = cache[0]
        >>> k.shape
        torch.Size([1, 4, 128, 64])
    """

    @checked(first=True)
    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_width: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
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
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(
                "KVCache: dtype must be float32, float64, float16 or bfloat16, "
                f"got {dtype_name(dtype)}"
            )
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
        """Count new tokens of each row: a number, or [B] where rows accepted different ones.

        What no row has room for is refused; on the GPU, where lengths are not looked at, only a
        number that none ever has.
        """
        self._check("tokens", tokens)
        if self._is_readable(tokens):
            for row, length in enumerate((self.lengths + tokens).tolist()):
                if not 0 <= length <= self.capacity:
                    raise ValueError(
                        f"KVCache: tokens must leave lengths in [0, {self.capacity}], "
                        f"got {length} for row {row}"
                    )
        self.lengths += tokens

    def truncate(self, lengths: int | Tensor) -> None:
        """Forget the tokens of each row from `lengths` on (a number or [B]), as 0 to start anew."""
        self._check("lengths", lengths)
        self.lengths.clamp_(max=torch.as_tensor(lengths, device=self.lengths.device))

    def _check(self, name: str, count: int | Tensor) -> None:
        """Refuse a count that is none, or that no row can hold."""
        B = self.lengths.shape[0]
        if isinstance(count, Tensor):
            is_integer = count.dtype in (torch.int64, torch.int32)
            if not is_integer or tuple(count.shape) not in ((), (1,), (B,)):
                raise ValueError(
                    f"KVCache: {name} must be an integer or int64 [{B}], got {describe(count)}"
                )
            counts = count.reshape(-1).tolist() if self._is_readable(count) else []
        elif hasattr(count, "__index__"):
            counts = [count]
        else:
            raise TypeError(
                f"KVCache: {name} must be an integer or int64 [{B}], got {describe(count)}"
            )
        for row, value in enumerate(counts):
            if not 0 <= value <= self.capacity:
                where = f" for row {row}" if len(counts) > 1 else ""
                raise ValueError(
                    f"KVCache: {name} must be in [0, {self.capacity}], got {value}{where}"
                )

    def _is_readable(self, count: int | Tensor) -> bool:
        """Whether looking waits for no device, and there is something to look at."""
        tensors = [self.lengths, *([count] if isinstance(count, Tensor) else [])]
        is_plain = all(t.is_cpu and type(t) is Tensor for t in tensors)
        return is_plain and not torch.compiler.is_compiling()

    def reorder(self, rows: Tensor) -> None:
        """Make row b what row rows[b] is, int64 [any]: beams that survive, rows that go on."""
        self.memory = self.memory.index_select(2, rows)
        self.lengths = self.lengths.index_select(0, rows)
        self.counters = self.counters.new_zeros(self.memory.shape[2] * self.memory.shape[3])
