"""nn.KVCache: what a step stores and where, and the bookkeeping around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mistakes import refused
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


MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "integers": (
        lambda c: KVCache(1, 1, 1, 8, 8, dtype=torch.int32),
        ValueError,
        "dtype must be float32, float64, float16 or bfloat16, got int32$",
    ),
    "a-size-that-is-none": (
        lambda c: KVCache(1, 1, None, 8, 8),  # type: ignore[arg-type]
        TypeError,
        "kv_heads must be an integer, got None$",
    ),
    "advance-negative": (
        lambda c: c.advance(-1),
        ValueError,
        r"tokens must be in \[0, 4\], got -1$",
    ),
    "advance-far": (lambda c: c.advance(5), ValueError, r"tokens must be in \[0, 4\], got 5$"),
    "advance-beyond": (
        lambda c: c.advance(2),
        ValueError,
        r"tokens must leave lengths in \[0, 4\], got 5 for row 2$",
    ),
    "advance-rows": (
        lambda c: c.advance(torch.tensor([3, 3, 1])),
        ValueError,
        r"tokens must leave lengths in \[0, 4\], got 5 for row 1$",
    ),
    "advance-negative-rows": (
        lambda c: c.advance(torch.tensor([1, -1, 0])),
        ValueError,
        r"tokens must be in \[0, 4\], got -1 for row 1$",
    ),
    "advance-shape": (
        lambda c: c.advance(torch.tensor([1, 1])),
        ValueError,
        r"tokens must be an integer or int64 \[3\], got int64 \[2\]$",
    ),
    "advance-dtype": (
        lambda c: c.advance(torch.ones(3)),
        ValueError,
        r"tokens must be an integer or int64 \[3\], got float32 \[3\]$",
    ),
    "advance-type": (
        lambda c: c.advance(1.5),
        TypeError,
        r"tokens must be an integer or int64 \[3\], got 1.5$",
    ),
    "truncate-negative": (
        lambda c: c.truncate(-1),
        ValueError,
        r"lengths must be in \[0, 4\], got -1$",
    ),
    "truncate-beyond": (
        lambda c: c.truncate(torch.tensor([0, 9, 0])),
        ValueError,
        r"lengths must be in \[0, 4\], got 9 for row 1$",
    ),
    "truncate-type": (
        lambda c: c.truncate(None),
        TypeError,
        r"lengths must be an integer or int64 \[3\], got None$",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_change_nothing(call: Any, error: type[Exception], message: str) -> None:
    cache = KVCache(1, 3, 1, 4, 2)
    cache.advance(torch.tensor([1, 2, 3]))
    refused(lambda: call(cache), error, f"KVCache: {message}")
    assert cache.lengths.tolist() == [1, 2, 3]
