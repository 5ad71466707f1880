"""What ops.causal_attention says of arguments that do not fit, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ops.attention_cases import BACKENDS
from seqkern import ops

call = ops.causal_attention
BAD_CALLS: dict[str, tuple[Any, str]] = {
    "q-dims": (
        lambda q, k: call(q[0], k, k),
        r"attention: q must be \[B, NH, Tq, D\], got float32 \[4, 5, 8\]",
    ),
    "q-dtype": (
        lambda q, k: call(q.long(), k, k),
        r"q must be float32, float64, float16 or bfloat16, got int64 \[2, 4, 5, 8\]",
    ),
    "q-width": (
        lambda q, k: call(q.repeat(1, 1, 1, 40), k, k),
        r"q must have a head width from 1 to 256, got float32 \[2, 4, 5, 320\]",
    ),
    "q-no-width": (
        lambda q, k: call(q[..., :0], k, k),
        r"q must have a head width from 1 to 256, got float32 \[2, 4, 5, 0\]",
    ),
    "k-batch": (
        lambda q, k: call(q, k[:1], k),
        r"k must be float32 \[2, NKV, Tk, 8\], got float32 \[1, 2, 7, 8\]",
    ),
    "k-width": (
        lambda q, k: call(q, k[..., :6], k),
        r"k must be float32 \[2, NKV, Tk, 8\], got float32 \[2, 2, 7, 6\]",
    ),
    "k-dtype": (
        lambda q, k: call(q, k.double(), k),
        r"k must be float32 \[2, NKV, Tk, 8\], got float64 \[2, 2, 7, 8\]",
    ),
    "k-heads": (
        lambda q, k: call(q, k.repeat(1, 2, 1, 1)[:, :3], k),
        r"k must have a number of heads that divides the 4 of q, got float32 \[2, 3, 7, 8\]",
    ),
    "k-positions": (
        lambda q, k: call(q, k[:, :, :4], k),
        r"k must have at least the 5 positions of q, got float32 \[2, 2, 4, 8\]",
    ),
    "v-shape": (
        lambda q, k: call(q, k, k[:, :, :6]),
        r"v must be float32 \[2, 2, 7, 8\], got float32 \[2, 2, 6, 8\]",
    ),
    "v-dtype": (
        lambda q, k: call(q, k, k.half()),
        r"v must be float32 \[2, 2, 7, 8\], got float16 \[2, 2, 7, 8\]",
    ),
    "window": (lambda q, k: call(q, k, k, window=0), "window must be at least 1 or None, got 0"),
    "softcap": (
        lambda q, k: call(q, k, k, softcap=-1.0),
        "softcap must be at least 0 and finite, got -1",
    ),
    "softcap-infinite": (
        lambda q, k: call(q, k, k, softcap=float("inf")),
        "softcap must be at least 0 and finite, got inf",
    ),
    "scale": (
        lambda q, k: call(q, k, k, scale=float("nan")),
        "scale must be a number, got nan",
    ),
    "dropout": (
        lambda q, k: call(q, k, k, dropout_p=1.0),
        r"dropout_p must be in \[0, 1\), got 1",
    ),
    "seed": (
        lambda q, k: call(q, k, k, dropout_p=0.1, dropout_seed=torch.ones(2)),
        r"dropout_seed must be int64 \[1\], got float32 \[2\]",
    ),
    "alibi-shape": (
        lambda q, k: call(q, k, k, alibi_slopes=q[0, :3, 0, 0]),
        r"alibi_slopes must be floating point \[4\] or \[2, 4\], got float32 \[3\]",
    ),
    "alibi-gradient": (
        lambda q, k: call(q, k, k, alibi_slopes=torch.ones(4, requires_grad=True)),
        r"alibi_slopes has no gradient here; pass alibi_slopes.detach\(\)",
    ),
    "lengths-shape": (
        lambda q, k: call(q, k, k, lengths=torch.tensor([1, 2, 3])),
        r"lengths must be int64 or int32 \[2\], got int64 \[3\]",
    ),
    "lengths-dtype": (
        lambda q, k: call(q, k, k, lengths=torch.ones(2)),
        r"lengths must be int64 or int32 \[2\], got float32 \[2\]",
    ),
    "packed-batch": (
        lambda q, k: call(q, k, k, cu_seqlens=torch.tensor([0, 5])),
        r"q must be \[1, NH, N, D\] with cu_seqlens, got float32 \[2, 4, 5, 8\]",
    ),
    "packed-positions": (
        lambda q, k: call(q[:1], k[:1], k[:1], cu_seqlens=torch.tensor([0, 5])),
        r"k must have the 5 tokens of q with cu_seqlens, got float32 \[1, 2, 7, 8\]",
    ),
    "packed-lengths": (
        lambda q, k: call(q, k, k, cu_seqlens=torch.tensor([0, 5]), lengths=torch.tensor([3, 3])),
        r"lengths must be None with cu_seqlens, got int64 \[2\]",
    ),
    "packed-dims": (
        lambda q, k: call(q[:1], q[:1], q[:1], cu_seqlens=torch.tensor(3)),
        r"cu_seqlens must be int64 or int32 \[S \+ 1\], got int64 \[\]",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize(("bad_call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_errors(backend: Any, bad_call: Any, message: str) -> None:
    q = torch.randn(2, 4, 5, 8, device=backend.device)
    k = torch.randn(2, 2, 7, 8, device=backend.device)
    with pytest.raises(ValueError, match=message) as raised:
        bad_call(q, k)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([5, 8], r"attention: lengths must be in \[0, 7\], got 8 at row 1"),
        ([-1, 3], r"attention: lengths must be in \[0, 7\], got -1 at row 0"),
    ],
)
def test_lengths_on_the_cpu(lengths: list[int], message: str) -> None:
    q = torch.randn(2, 2, 7, 8)
    with pytest.raises(ValueError, match=message):
        call(q, q, q, lengths=torch.tensor(lengths))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 5, 4], r"must not decrease, from 0 or more to at most 7, got 4 at 2"),
        ([0, 8], r"must not decrease, from 0 or more to at most 7, got 8 at 1"),
        ([-1, 7], r"must not decrease, from 0 or more to at most 7, got -1 at 0"),
    ],
)
def test_cu_seqlens_on_the_cpu(cu_seqlens: list[int], message: str) -> None:
    q = torch.randn(1, 2, 7, 8)
    with pytest.raises(ValueError, match=f"attention: cu_seqlens {message}"):
        call(q, q, q, cu_seqlens=torch.tensor(cu_seqlens))
