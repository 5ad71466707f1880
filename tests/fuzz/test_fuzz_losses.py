"""Random calls of the losses and of softmax, against their references in float64."""

from __future__ import annotations

import math
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

OPTIONS = st.fixed_dictionaries(
    {
        "reduction": st.sampled_from(["none", "mean", "sum"]),
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "z_loss": st.sampled_from([0.0, 1e-2]),
        "softcap": st.sampled_from([0.0, 2.0, 30.0]),
    }
)
COMMON = {
    "dtype": DTYPES,
    "options": OPTIONS,
    "layouts": st.lists(LAYOUTS, min_size=4, max_size=4),
    "upstream": LAYOUTS,
    "weight": st.booleans(),
    "ignored": st.sampled_from([0.0, 0.3, 1.0]),
    "ignore_index": st.sampled_from([-100, 0, 3]),
    "used": st.lists(st.booleans(), min_size=3, max_size=3),
    "threads": THREADS,
    "seed": SEEDS,
}


def upstream(case: dict[str, Any], rows: list[int], values: Values) -> Any:
    """The gradient of an output, for those that something uses."""
    drawn = [values.normal(*rows, dtype=torch.float32) for _ in case["used"]]

    def of(i: int, output: Tensor) -> Tensor | None:
        if not case["used"][i]:
            return None
        grad = drawn[i] if output.dim() or not rows else torch.tensor(0.7)
        return laid_out(grad.to(output.dtype), case["upstream"])

    return of


def targets(case: dict[str, Any], rows: list[int], values: Values) -> tuple[Tensor, int]:
    """Classes, some of which are to be ignored."""
    kind = getattr(torch, case["target"])
    ignore = case["ignore_index"]
    V = case["V"]
    if kind == torch.uint8:
        ignore, V = max(ignore, 3), min(V, 256)
    target = values.integers(0, V, *rows)
    dropped = torch.rand(target.shape, generator=values.random) < case["ignored"]
    return target.masked_fill(dropped, ignore).to(kind), ignore


# ---------------------------------------------------------------- cross_entropy


def cross_entropy_cases(tiny: bool) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "rows": st.lists(
                sizes(2, 5, least=0) if tiny else sizes(3, 20, 150, least=0), max_size=3
            ),
            "V": sizes(20, 200) if tiny else sizes(20, 200, 3000),
            "target": st.sampled_from(["int64", "int32", "uint8", "probabilities"]),
            "scale": st.sampled_from([1.0, 8.0, 0.0]),
            "return_lse": st.booleans(),
            **COMMON,
        }
    ).filter(lambda c: math.prod(c["rows"]) * c["V"] < (2e4 if tiny else 3e6))


def run_cross_entropy(case: dict[str, Any], function: Any, dtype: torch.dtype) -> list[Any]:
    values = Values(case["seed"])
    V, rows = case["V"], case["rows"]
    logits = values.normal(*rows, V, dtype=case["dtype"], scale=case["scale"])
    weight = values.normal(V, dtype=case["dtype"]).abs() if case["weight"] else None
    if case["target"] == "probabilities":
        ignore = -100
        target = values.normal(*rows, V, dtype=torch.float64).softmax(-1).to(case["dtype"])
    else:
        target, ignore = targets(case, rows, values)
        if not case["layouts"][1].startswith("same"):
            logits = logits.masked_fill((target == ignore)[..., None], torch.nan)

    def call(logits: Tensor, target: Tensor, weight: Tensor | None) -> Any:
        return function(logits, target, weight, ignore_index=ignore, **case["options"])

    tensors = [t.to(dtype) if floats(t) else t for t in (logits, target, weight)]
    wanted = [True, False, False]
    return results(call, tensors, case["layouts"][:3], wanted, upstream(case, rows, values))


def floats(t: Tensor | None) -> bool:
    return t is not None and t.is_floating_point()


@on_backends
@calls
@given(data=st.data())
def test_cross_entropy(backend: Any, data: Any) -> None:
    case = data.draw(cross_entropy_cases(backend.tiny))
    torch.set_num_threads(case["threads"])
    return_lse = case["return_lse"]

    def ours(logits: Tensor, target: Tensor, weight: Tensor | None, **options: Any) -> Any:
        if logits.dim() > 2:  # classes where torch has them
            logits = logits.movedim(-1, 1)
            target = target.movedim(-1, 1) if target.is_floating_point() else target
        return ops.cross_entropy(logits, target, weight, return_lse=return_lse, **options)

    def plain(*tensors: Tensor | None, **options: Any) -> Any:
        loss, lse = reference.cross_entropy(*tensors, **options)
        return (loss, lse) if return_lse else loss

    dtype = case["dtype"]
    compare(
        run_cross_entropy(case, ours, dtype),
        run_cross_entropy(case, plain, accumulated(dtype)),
        run_cross_entropy(case, plain, torch.float64),
        dtype,
    )


# ---------------------------------------------------------------- linear_cross_entropy


def linear_cases(tiny: bool) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "rows": st.lists(
                sizes(2, 5, least=0) if tiny else sizes(3, 20, 150, least=0), max_size=2
            ),
            "H": sizes(20) if tiny else sizes(20, 100, 300),
            "V": sizes(20, 70) if tiny else sizes(20, 200, 2000),
            "target": st.sampled_from(["int64", "int32", "uint8"]),
            "scale": st.sampled_from([1.0, 4.0, 0.0]),
            "bias": st.booleans(),
            "return_lse": st.booleans(),
            "return_logprobs": st.booleans(),
            "chunk_bytes": st.sampled_from([None, 1, 5000, 10**6]),
            "wanted": st.lists(st.booleans(), min_size=3, max_size=3),
            **COMMON,
        }
    ).filter(lambda c: math.prod(c["rows"]) * c["V"] * c["H"] < (2e4 if tiny else 1e8))


def run_linear(
    case: dict[str, Any], function: Any, dtype: torch.dtype, skips_ignored: bool
) -> list[Any]:
    """`skips_ignored`: ignored rows hold NaN, which on CUDA reaches the weight's gradient."""
    values = Values(case["seed"])
    rows, H, V = case["rows"], case["H"], case["V"]
    hidden = values.normal(*rows, H, dtype=case["dtype"], scale=case["scale"] / H**0.5)
    head = values.normal(V, H, dtype=case["dtype"])
    bias = values.normal(V, dtype=case["dtype"]) if case["bias"] else None
    class_weight = values.normal(V, dtype=case["dtype"]).abs() if case["weight"] else None
    target, ignore = targets(case, rows, values)
    one_target = any(layout.startswith("same") for layout in case["layouts"][1:3])
    if skips_ignored and not one_target:
        hidden = hidden.masked_fill((target == ignore)[..., None], torch.nan)

    def call(hidden: Tensor, target: Tensor, head: Tensor, bias: Tensor | None) -> Any:
        if function is ops.linear_cross_entropy:
            extra = {n: case[n] for n in ("return_lse", "return_logprobs", "chunk_bytes")}
            return function(
                hidden,
                head,
                target,
                bias,
                class_weight=class_weight,
                ignore_index=ignore,
                **extra,
                **case["options"],
            )
        weight = None if class_weight is None else class_weight.to(dtype)
        loss, lse, logprobs = function(
            hidden, head, target, bias, weight, ignore, **case["options"]
        )
        found = (loss, *([lse] if case["return_lse"] else []))
        return (*found, *([logprobs] if case["return_logprobs"] else []))

    tensors = [t.to(dtype) if floats(t) else t for t in (hidden, target, head, bias)]
    wanted = [case["wanted"][0], False, *case["wanted"][1:]]
    return results(call, tensors, case["layouts"], wanted, upstream(case, rows, values))


@on_backends
@calls
@given(data=st.data())
def test_linear_cross_entropy(backend: Any, data: Any) -> None:
    case = data.draw(linear_cases(backend.tiny))
    torch.set_num_threads(case["threads"])
    dtype = case["dtype"]
    plain, skips = reference.linear_cross_entropy, backend.name == "cpu"
    compare(
        run_linear(case, ops.linear_cross_entropy, dtype, skips),
        run_linear(case, plain, accumulated(dtype), skips),
        run_linear(case, plain, torch.float64, skips),
        dtype,
    )


# ---------------------------------------------------------------- softmax


def softmax_cases(tiny: bool) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "shape": st.lists(
                sizes(2, 5, 30, least=0) if tiny else sizes(3, 20, 150, 1000, least=0),
                min_size=1,
                max_size=4,
            ),
            "dtype": DTYPES,
            "log": st.booleans(),
            "layout": LAYOUTS,
            "upstream": LAYOUTS,
            "scale": st.sampled_from([1.0, 10.0, 0.0]),
            "threads": THREADS,
            "seed": SEEDS,
        }
    ).filter(lambda c: math.prod(c["shape"]) < (2e3 if tiny else 2e6))


@on_backends
@calls
@given(data=st.data())
def test_softmax(backend: Any, data: Any) -> None:
    case = data.draw(softmax_cases(backend.tiny))
    torch.set_num_threads(case["threads"])
    dtype = case["dtype"]

    def run(function: Any, dtype: torch.dtype) -> list[Any]:
        values = Values(case["seed"])
        x = values.normal(*case["shape"], dtype=case["dtype"], scale=case["scale"]).to(dtype)
        grad = values.normal(*case["shape"], dtype=case["dtype"]).to(dtype)
        return results(
            function, [x], [case["layout"]], [True], lambda *_: laid_out(grad, case["upstream"])
        )

    ours = ops.log_softmax if case["log"] else ops.softmax
    plain = torch.log_softmax if case["log"] else torch.softmax
    by_torch = lambda x: plain(x, -1)  # noqa: E731
    compare(run(ours, dtype), run(by_torch, dtype), run(by_torch, torch.float64), dtype)
