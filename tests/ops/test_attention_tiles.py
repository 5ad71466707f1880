"""ops.causal_attention in 16-bit numbers, at the edges of the tiles that a matrix unit, or vector
units that multiply bf16, take: 16 rows, 32 numbers deep."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accuracy import assert_accurate
from ops.attention_cases import NATIVE, Sizes, exact, make, ours, resolve, run, torchs

native = pytest.mark.parametrize("backend", NATIVE, indirect=True)
bfloat16 = torch.bfloat16


def check(qkv: Any, **options: Any) -> None:
    results = zip(
        run(ours, qkv, **options),
        torchs(qkv, **options),
        exact(qkv, **options),
        strict=True,
    )
    for actual, theirs, truth in results:
        infinite = truth == -torch.inf
        assert torch.equal(actual == -torch.inf, infinite)
        a, t, e = (x.masked_fill(infinite, 0.0) for x in (actual, theirs, truth))
        assert_accurate(a, t, e, a.dtype)


EDGES = [
    Sizes(B=1, NH=2, NKV=1, Tq=1, Tk=33, D=40),
    Sizes(B=2, NH=4, NKV=2, Tq=15, Tk=47, D=80),
    Sizes(B=1, NH=2, NKV=2, Tq=17, Tk=17, D=256),
    Sizes(B=2, NH=2, NKV=1, Tq=17, Tk=65, D=72),
    Sizes(B=2, NH=2, NKV=1, Tq=33, Tk=300, D=40),
    Sizes(B=1, NH=1, NKV=1, Tq=421, Tk=450, D=24),
    # Enough heads to take more queries at a time; more keys of a task than are kept packed.
    Sizes(B=1, NH=8, NKV=4, Tq=400, Tk=400, D=16),
    Sizes(B=1, NH=8, NKV=4, Tq=400, Tk=400, D=20),
    Sizes(B=1, NH=1, NKV=1, Tq=33, Tk=2400, D=256),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "negative-scale": {"scale": -0.2},
    "window": {"window": 20},
    "lengths": {"lengths": True},
    "softcap": {"softcap": 1.5},
    "dropout": {"dropout": 0.3},
    "all": {"lengths": True, "alibi": "rows", "softcap": 2.0, "dropout": 0.2, "window": 45},
}


@native
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("sizes", EDGES, ids=str)
def test_edges(backend: Any, sizes: Sizes, options: dict[str, Any]) -> None:
    check(make(sizes, bfloat16, backend.device), **resolve(options, sizes, backend.device))


@native
@pytest.mark.parametrize("window", [None, 20])
def test_packed(backend: Any, window: int | None) -> None:
    starts = torch.tensor([3, 8, 8, 9, 140, 205, 300], device=backend.device)
    qkv = make(Sizes(B=1, NH=4, NKV=2, Tq=310, Tk=310, D=48), bfloat16, backend.device)
    check(qkv, cu_seqlens=starts, window=window)


@native
@pytest.mark.parametrize("filler", [torch.nan, torch.inf])
def test_padding_is_never_read(backend: Any, filler: float) -> None:
    qkv = make(Sizes(B=3, NH=2, NKV=1, Tq=50, Tk=70), bfloat16, backend.device)
    lengths = torch.tensor([70, 41, 0], device=backend.device)
    expected = run(ours, qkv, lengths=lengths)
    padded = torch.arange(70, device=backend.device) >= lengths[:, None]  # [B, Tk]
    q, k, v = (t.masked_fill(padded[:, None, -t.shape[2] :, None], filler) for t in qkv)
    for actual, wanted in zip(run(ours, (q, k, v), lengths=lengths), expected, strict=True):
        assert torch.equal(actual, wanted)


@native
@pytest.mark.parametrize("D", [8, 40, 128])
def test_a_query_that_sees_one_key_is_exact(backend: Any, D: int) -> None:
    """Its weight is 1 whatever it is: the output is the value, and the score has no gradient."""
    q, k, v = make(Sizes(Tq=70, Tk=70, D=D), bfloat16, backend.device)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = ours(*leaves, window=1)[0]
    upstream = torch.randn(out.shape).to(out)
    dq, dk, dv = torch.autograd.grad(out, leaves, upstream)
    assert torch.equal(out, v)
    assert torch.equal(dv, upstream)
    assert (dq == 0).all()
    assert (dk == 0).all()


@native
@pytest.mark.parametrize(("T", "D"), [(40, 16), (70, 32)])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_special_scores(backend: Any, value: float, T: int, D: int) -> None:
    """A key of infinities: +inf and NaN reach the queries that see it, -inf weighs nothing."""
    q, k, v = make(Sizes(B=1, NH=1, NKV=1, Tq=T, Tk=T, D=D), bfloat16, backend.device)
    q = q.abs() + 0.1
    k[0, 0, 6] = value
    out, lse = ours(q, k, v)
    expected = [t.float() for t in (q, k, v)]
    wanted_out, wanted_lse = ours(*expected)
    torch.testing.assert_close(out.float(), wanted_out, equal_nan=True, rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse, wanted_lse, equal_nan=True, rtol=1e-3, atol=1e-3)
