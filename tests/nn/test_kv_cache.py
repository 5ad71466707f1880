"""nn.KVCache: what a step stores and where, and the bookkeeping around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqkern import ops
from seqkern.nn import KVCache


def test_steps_fill_the_cache_at_each_rows_length(backend: Any) -> None:
    cache = KVCache(2, 2, 1, 12, 8, device=backend.device)
    cache.advance(torch.tensor([3, 0], device=backend.device))
    q, k, v = (torch.randn(2, 1, 2, 8, device=backend.device) for _ in range(3))
    for layer in range(len(cache)):
        ops.attention_step(q, k, v, *cache[layer], cache.lengths, counters=cache.counters)
    cache.advance(2)
    assert cache.lengths.tolist() == [5, 2]
    assert not cache.counters.any()
    for layer in range(2):
        for row, first in enumerate((3, 0)):
            keys, values = (t[row, :, first : first + 2] for t in cache[layer])
            assert torch.equal(keys, k[row])
            assert torch.equal(values, v[row])
            assert not cache[layer][0][row, :, first + 2 :].any()


def test_truncate_and_reorder() -> None:
    cache = KVCache(1, 3, 1, 4, 2)
    cache.advance(torch.tensor([1, 2, 3]))
    cache.memory[:] = torch.arange(3.0)[:, None, None, None]
    cache.truncate(2)
    assert cache.lengths.tolist() == [1, 2, 2]
    cache.reorder(torch.tensor([2, 0, 0]))
    assert cache.lengths.tolist() == [2, 1, 1]
    assert cache[0][1][:, 0, 0, 0].tolist() == [2.0, 0.0, 0.0]
    cache.truncate(torch.tensor([0, 1, 0]))
    assert cache.lengths.tolist() == [0, 1, 0]
    assert cache.capacity == 4


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="KVCache: kv_heads must be at least 1, got 0"):
        KVCache(1, 1, 0, 8, 8)
