"""Random calls of causal attention, and of its step over a cache, against their references."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fuzz.drawing import (
    DTYPES,
    LAYOUTS,
    SEEDS,
    THREADS,
    Values,
    accumulated,
    calls,
    compare,
    laid_out,
    on_backends,
    results,
    sizes,
)
from seqkern import ops, reference

SOFTCAP = st.sampled_from([0.0, 0.0, 2.0, 20.0])
SCALE = st.sampled_from([None, None, 0.3, -0.2, 0.0])


def cases(tiny: bool) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "B": sizes(3, least=0),
            "NKV": sizes(3),
            "group": st.sampled_from([1, 1, 2, 3, 5]),
            "Tq": sizes(20, least=0) if tiny else sizes(10, 70, 300, least=0),
            "more": st.one_of(st.just(0), sizes(10) if tiny else sizes(10, 70, 300)),
            "D": sizes(20, 70)
            if tiny
            else st.one_of(sizes(20, 70, 256), st.sampled_from([64, 128])),
            "dtype": DTYPES,
            "scale": SCALE,
            "window": st.one_of(st.none(), sizes(5, 40, 300)),
            "softcap": SOFTCAP,
            "alibi": st.sampled_from([None, None, "heads", "rows"]),
            "dropout_p": st.sampled_from([0.0, 0.0, 0.3]),
            "lengths": st.booleans(),
            "packed": st.booleans(),
            "layouts": st.lists(LAYOUTS, min_size=3, max_size=3),
            "upstream": LAYOUTS,
            "used": st.lists(st.booleans(), min_size=2, max_size=2),
            "wanted": st.lists(st.booleans(), min_size=3, max_size=3),
            "return_lse": st.booleans(),
            "threads": THREADS,
            "seed": SEEDS,
        }
    ).filter(
        lambda c: (
            c["B"] * c["NKV"] * c["group"] * c["Tq"] * (c["Tq"] + c["more"]) * c["D"]
            < (1e4 if tiny else 3e7)
        )
    )


def run(case: dict[str, Any], function: Any, dtype: torch.dtype) -> list[Any]:
    values = Values(case["seed"])
    B, NKV, D, Tq = (case[name] for name in ("B", "NKV", "D", "Tq"))
    NH, Tk = NKV * case["group"], Tq + case["more"]
    options = {name: case[name] for name in ("scale", "window", "softcap")}
    packed = case["packed"] and Tq == Tk and Tq > 0
    if packed:
        B = 1
        ends = sorted(values.integers(0, Tk + 1, 3).tolist())
        options["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
    elif case["lengths"]:
        options["lengths"] = values.integers(0, Tk + 1, B)
    if case["alibi"]:
        rows = (B,) if case["alibi"] == "rows" else ()
        options["alibi_slopes"] = values.normal(*rows, NH, dtype=torch.float32).abs()
    if case["dropout_p"]:
        options["dropout_p"] = case["dropout_p"]
        options["dropout_seed"] = torch.tensor([case["seed"]])
    shapes = [(B, NH, Tq, D), (B, NKV, Tk, D), (B, NKV, Tk, D)]
    qkv = [values.normal(*shape, dtype=case["dtype"]).to(dtype) for shape in shapes]
    ups = [values.normal(*shapes[0][: 4 - i], dtype=torch.float32) for i in range(2)]

    def call(*qkv: Tensor) -> Any:
        if function is ops.causal_attention:
            return function(*qkv, return_lse=case["return_lse"], **options)
        out, lse = function(*qkv, **options)
        return (out, lse) if case["return_lse"] else out

    def upstream(i: int, output: Tensor) -> Tensor | None:
        grad = ups[i].to(case["dtype"]) if i == 0 else ups[i]
        return laid_out(grad.to(output.dtype), case["upstream"]) if case["used"][i] else None

    return results(call, qkv, case["layouts"], case["wanted"], upstream)


@on_backends
@calls
@given(data=st.data())
def test_causal_attention(backend: Any, data: Any) -> None:
    case = data.draw(cases(backend.tiny))
    torch.set_num_threads(case["threads"])
    dtype = case["dtype"]
    plain = reference.causal_attention
    compare(
        run(case, ops.causal_attention, dtype),
        run(case, plain, accumulated(dtype)),
        run(case, plain, torch.float64),
        dtype,
        floor=case["D"] ** 0.5,  # of q k and do o, whose differences may be nothing
    )


# ---------------------------------------------------------------- attention_step

CACHES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def step_cases(tiny: bool) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "B": sizes(4),
            "NKV": sizes(3),
            "group": st.sampled_from([1, 1, 2, 3, 8]),
            "S": st.integers(1, 16),
            "L": sizes(20, 40) if tiny else sizes(20, 200, 1500),
            "D": (sizes(20) if tiny else sizes(20, 70, 256)),
            "dtype": DTYPES,
            "cache": CACHES,
            "scale": SCALE,
            "window": st.one_of(st.none(), sizes(5, 40, 300)),
            "softcap": SOFTCAP,
            "rotary": st.sampled_from([0.0, 0.5, 1.0]),
            "rotary_interleaved": st.booleans(),
            "layouts": st.lists(st.sampled_from(["contiguous", "gaps"]), min_size=3, max_size=3),
            "heads_last": st.booleans(),
            "threads": THREADS,
            "seed": SEEDS,
        }
    ).filter(
        lambda c: (
            c["L"] >= c["S"]
            and c["B"] * c["NKV"] * c["group"] * c["S"] * c["L"] * c["D"] < (2e4 if tiny else 3e7)
        )
    )


def run_step(case: dict[str, Any], function: Any, dtype: torch.dtype | None) -> list[Any]:
    """In the dtypes of the case for None."""
    values = Values(case["seed"])
    B, NKV, S, L, D = (case[name] for name in ("B", "NKV", "S", "L", "D"))
    NH = NKV * case["group"]
    given = case["dtype"]
    cached = case["cache"] if given == torch.float32 else given
    caches = [values.normal(B, NKV, L, D, dtype=cached) for _ in range(2)]
    positions = values.integers(0, L - S + 1, B)
    beyond = torch.arange(L) >= positions[:, None]
    caches = [c.masked_fill(beyond[:, None, :, None], torch.nan) for c in caches]
    new = [values.normal(B, heads, S, D, dtype=given) for heads in (NH, NKV, NKV)]
    options = {name: case[name] for name in ("scale", "window", "softcap", "rotary_interleaved")}
    half = int(case["rotary"] * (D // 2))
    if half:
        angles = values.normal(L, half, dtype=torch.float32)
        options["rotary"] = (angles.cos(), angles.sin())
    if dtype is not None:
        new, caches = [t.to(dtype) for t in new], [t.to(dtype) for t in caches]
    if case["heads_last"]:
        caches = [laid_out(c.transpose(1, 2), "gaps").transpose(1, 2) for c in caches]
    else:
        caches = [laid_out(c, layout) for c, layout in zip(caches, case["layouts"], strict=False)]
    new = [laid_out(t, layout) for t, layout in zip(new, case["layouts"], strict=True)]
    out = function(*new, *caches, positions, **options)
    return [out, *(c.nan_to_num(0.0) for c in caches)]


@on_backends
@calls
@given(data=st.data())
def test_attention_step(backend: Any, data: Any) -> None:
    case = data.draw(step_cases(backend.tiny))
    torch.set_num_threads(case["threads"])
    plain = reference.attention_step
    actual = run_step(case, ops.attention_step, None)
    rounded = actual[1].dtype
    # What the caches hold is rounded to their dtype, and read so.
    compare(
        actual,
        run_step(case, plain, accumulated(case["dtype"])),
        run_step(case, plain, torch.float64),
        case["dtype"] if rounded == torch.float32 else rounded,
    )
