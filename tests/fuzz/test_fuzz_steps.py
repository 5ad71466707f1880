"""Random calls of the ops that decode: linear_step, and sample."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

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
    sizes,
)
from seqkern import ops, reference

ROWS_APART = st.sampled_from(["contiguous", "offset", "gaps", "same rows"])


def linear_cases(tiny: bool) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "rows": st.lists(sizes(4, least=0) if tiny else sizes(4, 30, least=0), max_size=2),
            "K": sizes(9, 40) if tiny else sizes(9, 100, 900),
            "M": sizes(9, 40) if tiny else sizes(9, 100, 900),
            "dtype": DTYPES,
            "weight": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
            "norm": st.sampled_from([None, "layer_norm", "rms_norm"]),
            "activation": st.sampled_from([None, "gelu", "gelu_tanh", "silu", "relu"]),
            "gated": st.booleans(),
            "there": st.lists(st.booleans(), min_size=4, max_size=4),
            "eps": st.sampled_from([1e-5, 1e-2]),
            "layouts": st.lists(LAYOUTS, min_size=5, max_size=5),
            "weight_layout": ROWS_APART,
            "threads": THREADS,
            "seed": SEEDS,
        }
    )


def run_linear(case: dict[str, Any], function: Any, dtype: torch.dtype | None) -> list[Any]:
    """In the dtypes of the case for None."""
    values = Values(case["seed"])
    K, M, rows = case["K"], case["M"], case["rows"]
    of_weights = case["weight"] if case["dtype"] == torch.float32 else case["dtype"]
    high = 2 * M if case["gated"] else M
    x = values.normal(*rows, K, dtype=case["dtype"])
    weight = values.normal(high, K, dtype=of_weights, scale=K**-0.5)
    others = [values.normal(n, dtype=of_weights) for n in (high, K, K)]
    residual = values.normal(*rows, M, dtype=case["dtype"])
    tensors = [x, *others, residual]
    if dtype is not None:
        tensors, weight = [t.to(dtype) for t in tensors], weight.to(dtype)
    layouts = list(case["layouts"])
    if case["norm"] and layouts[0].startswith("same"):
        layouts[0] = "step"  # a norm divides what rounding leaves of equal numbers
    tensors = [laid_out(t, layout) for t, layout in zip(tensors, layouts, strict=True)]
    x, bias, norm_weight, norm_bias, residual = (
        t if there else None for t, there in zip(tensors, [True, *case["there"]], strict=True)
    )
    options: dict[str, Any] = {"activation": case["activation"], "gated": case["gated"]}
    if case["norm"]:
        options |= {"norm": case["norm"], "norm_weight": norm_weight, "eps": case["eps"]}
        if case["norm"] == "layer_norm":
            options["norm_bias"] = norm_bias
    weight = laid_out(weight, case["weight_layout"])
    return [function(x, weight, bias, residual=residual, **options)]


@on_backends
@calls
@given(data=st.data())
def test_linear_step(backend: Any, data: Any) -> None:
    case = data.draw(linear_cases(backend.tiny))
    torch.set_num_threads(case["threads"])
    plain = reference.linear_step
    compare(
        run_linear(case, ops.linear_step, None),
        run_linear(case, plain, accumulated(case["dtype"])),
        run_linear(case, plain, torch.float64),
        case["dtype"],
        floor=1.0,
    )


# ---------------------------------------------------------------- sample


def per_row(low: float, high: float, *special: float) -> st.SearchStrategy[Any]:
    """A number, one per row, or one of `special`: sixteenths, which float32 holds."""
    value = st.integers(int(16 * low), int(16 * high)).map(lambda n: n / 16)
    return st.one_of(*(st.just(s) for s in special), value, st.lists(value, min_size=6, max_size=6))


def sample_cases(tiny: bool) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "B": sizes(6),
            "V": sizes(10, 300) if tiny else sizes(10, 300, 6000),
            "dtype": DTYPES,
            "layout": LAYOUTS,
            "scale": st.sampled_from([1.0, 4.0, 20.0, 0.0]),
            "grid": st.booleans(),
            "banned": st.sampled_from([0.0, 0.5, 0.95]),
            "temperature": per_row(0.125, 3.0, 0.0, 1.0),
            "top_k": st.one_of(st.just(0), st.integers(1, 40), st.just(10**6)),
            "top_p": per_row(0.0625, 1.0, 1.0),
            "min_p": per_row(0.0, 1.0, 0.0),
            "repetition_penalty": per_row(0.5, 2.0, 1.0),
            "presence_penalty": per_row(-1.0, 1.0, 0.0),
            "frequency_penalty": per_row(-1.0, 1.0, 0.0),
            "counts": st.booleans(),
            "step": st.integers(0, 2**40),
            "logprobs": st.sampled_from(["drawn", "model"]),
            "threads": THREADS,
            "seed": SEEDS,
        }
    )


@on_backends
@calls
@given(data=st.data())
def test_sample(backend: Any, data: Any) -> None:
    case = data.draw(sample_cases(backend.tiny))
    torch.set_num_threads(case["threads"])
    values = Values(case["seed"])
    B, V = case["B"], case["V"]
    logits = values.normal(B, V, dtype=case["dtype"], scale=case["scale"])
    if case["grid"]:  # equal scores
        logits = logits.round()
    banned = torch.rand(B, V, generator=values.random) < case["banned"]
    banned[:, 0] = False
    logits = laid_out(logits.masked_fill(banned, -torch.inf), case["layout"])

    def option(name: str) -> Any:
        value = case[name]
        return torch.tensor(value[:B]) if isinstance(value, list) else value

    names = ["temperature", "top_k", "top_p", "min_p"]
    options = {name: option(name) for name in names}
    if case["counts"]:
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            options[name] = option(name)
        options["token_counts"] = values.integers(-3, 4, B, V).clamp_min(0)
    tokens, logprobs = ops.sample(
        logits, seed=case["seed"], step=case["step"], logprobs=case["logprobs"], **options
    )
    # Where the mass of the first tokens is top_p to rounding, one more or less of them stays, and a
    # token of min_p times the largest probability may.
    row, one = torch.arange(B), torch.ones(B)
    allowed = []
    for shift in (0.0, -1e-5, 1e-5):
        eased = dict(options)
        top_p = options["top_p"] * one
        eased["top_p"] = torch.where(top_p < 1, top_p + shift, top_p)
        eased["min_p"] = (options["min_p"] * one - shift).clamp(0, 1)
        allowed.append(reference.token_distribution(logits.float(), **eased)[row, tokens])
    if case["logprobs"] == "model":
        assert (torch.stack(allowed) > 0).any(0).all()
        truth = logits.float().double().log_softmax(-1)[row, tokens]
        torch.testing.assert_close(logprobs.double(), truth, rtol=1e-4, atol=1e-4)
    else:
        p = logprobs.double().exp()
        near = [(p - a).abs() <= 1e-3 * a + 1e-6 for a in allowed]
        near = [n & (a > 0) for n, a in zip(near, allowed, strict=True)]
        assert torch.stack(near).any(0).all(), (p, allowed)
    first = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    alone, _ = ops.sample(logits[:1], seed=case["seed"], step=case["step"], **first)
    assert alone[0] == tokens[0]
