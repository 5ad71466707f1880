"""Random calls of the recurrent layers and their cells, against their references in float64."""

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
    calls,
    compare,
    laid_out,
    on_backends,
    results,
    sizes,
)
from seqkern import ops, reference

KINDS = {"lstm": 4, "gru": 3, "rnn": 1}


def cases(tiny: bool, steps: bool = True) -> st.SearchStrategy[dict[str, Any]]:
    """Of layers, or of cells, which read large weights differently."""
    large = sizes(9, 70, 300) if steps else st.one_of(sizes(9, 70, 300), st.integers(300, 800))
    return st.fixed_dictionaries(
        {
            "kind": st.sampled_from(sorted(KINDS)),
            "T": st.just(1) if not steps else sizes(4) if tiny else sizes(4, 20, 70),
            "B": sizes(5, least=0) if tiny else sizes(4, 20, 70, least=0),
            "I": sizes(9, 30) if tiny else sizes(9, 70, 200),
            "H": sizes(9, 30) if tiny else large,
            "P": st.one_of(st.just(0), sizes(9, 30)),
            "dtype": DTYPES,
            "tokens": st.sampled_from([None, None, torch.int64, torch.int32]),
            "transposed": st.booleans(),
            "state": st.booleans(),
            "biases": st.lists(st.booleans(), min_size=2, max_size=2),
            "lengths": st.sampled_from([None, None, torch.int64, torch.int32]),
            "reverse": st.booleans(),
            "recompute": st.booleans(),
            "return_cells": st.booleans(),
            "nonlinearity": st.sampled_from(["tanh", "relu"]),
            "layouts": st.lists(LAYOUTS, min_size=8, max_size=8),
            "upstream": LAYOUTS,
            "used": st.lists(st.booleans(), min_size=4, max_size=4),
            "wanted": st.lists(st.booleans(), min_size=8, max_size=8),
            "threads": THREADS,
            "seed": SEEDS,
        }
    ).filter(
        lambda c: c["T"] * max(c["B"], 1) * c["H"] * (c["H"] + c["I"]) < (8e3 if tiny else 5e7)
    )


def nonlinearity(case: dict[str, Any]) -> str:
    """In 16 bits a unit of a relu's that is nearly 0 is on either side of it, by rounding."""
    exact = case["dtype"] in (torch.float32, torch.float64)
    return case["nonlinearity"] if exact else "tanh"


def weights(case: dict[str, Any], values: Values, P: int) -> list[Tensor | None]:
    """w_ih, w_hh, b_ih, b_hh and w_hr; in the case's dtype."""
    gates, H = KINDS[case["kind"]] * case["H"], case["H"]
    w_ih = values.normal(gates, case["I"], dtype=case["dtype"], scale=case["I"] ** -0.5)
    w_hh = values.normal(gates, P or H, dtype=case["dtype"], scale=(P or H) ** -0.5)
    biases = [values.normal(gates, dtype=case["dtype"]) for _ in range(2)]
    w_hr = values.normal(P, H, dtype=case["dtype"], scale=H**-0.5) if P else None
    return [
        w_ih,
        w_hh,
        *(b if there else None for b, there in zip(biases, case["biases"], strict=True)),
        w_hr,
    ]


def upstream(case: dict[str, Any]) -> Any:
    values = Values(case["seed"] + 1)

    def of(i: int, output: Tensor) -> Tensor | None:
        grad = values.normal(*output.shape, dtype=case["dtype"]).to(output.dtype)
        return laid_out(grad, case["upstream"]) if case["used"][i] else None

    return of


def run(case: dict[str, Any], is_ours: bool, dtype: torch.dtype) -> list[Any]:
    kind, T, B, H = (case[name] for name in ("kind", "T", "B", "H"))
    P = case["P"] if kind == "lstm" else 0
    values = Values(case["seed"])
    tensors: list[Tensor | None] = []
    if case["tokens"]:
        tensors.append(values.integers(0, case["I"], T, B, dtype=case["tokens"]))
    else:
        tensors.append(values.normal(T, B, case["I"], dtype=case["dtype"]))
    widths = (P or H, H) if kind == "lstm" else (H,)
    states = [values.normal(B, n, dtype=case["dtype"]) for n in widths]
    tensors += states if case["state"] else [None] * len(states)
    tensors += weights(case, values, P)
    lengths = None
    if case["lengths"]:
        lengths = values.integers(0, T + 1, B, dtype=case["lengths"])
        padding = torch.arange(T)[:, None] >= lengths
        x = tensors[0]
        assert x is not None
        if not case["layouts"][0].startswith("same"):
            tensors[0] = (
                x.masked_fill(padding, -5)
                if case["tokens"]
                else x.masked_fill(padding[..., None], torch.nan)
            )
    options = {"lengths": lengths, "reverse": case["reverse"]}
    layouts = list(case["layouts"])
    first = len(widths) + 1
    if case["transposed"]:
        layouts[first] = "permuted"
    if layouts[first + 1].startswith("same"):
        layouts[first + 1] = "step"  # such a product would grow with every step

    def call(*given: Tensor | None) -> Any:
        x, *rest = given
        state, rest = rest[: len(widths)], rest[len(widths) :]
        if kind == "lstm":
            w = rest[:4] + ([rest[4]] if P else [None])
            if not is_ours:
                found = reference.lstm(x, *state, *w, **options)
                return found if case["return_cells"] else found[:3]
            pair = None if state[0] is None else tuple(state)
            found = ops.lstm(
                x,
                pair,
                *w,
                recompute=case["recompute"],
                return_cells=case["return_cells"],
                **options,
            )
            return (found[0], *found[1], *found[2:])
        w = rest[:4]
        if kind == "rnn":
            options["nonlinearity"] = nonlinearity(case)
            return (ops if is_ours else reference).rnn(x, state[0], *w, **options)
        extra = {"recompute": case["recompute"]} if is_ours else {}
        return (ops if is_ours else reference).gru(x, state[0], *w, **extra, **options)

    tensors = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]
    n = len(tensors)
    wanted = [
        w and t is not None and t.is_floating_point()
        for w, t in zip(case["wanted"][:n], tensors, strict=True)
    ]
    return results(call, tensors, layouts[:n], wanted, upstream(case))


@on_backends
@calls
@given(data=st.data())
def test_layers(backend: Any, data: Any) -> None:
    case = data.draw(cases(backend.tiny))
    torch.set_num_threads(case["threads"])
    dtype = case["dtype"]
    compare(
        run(case, True, dtype),
        run(case, False, dtype),
        run(case, False, torch.float64),
        dtype,
    )


def run_cell(case: dict[str, Any], is_ours: bool, dtype: torch.dtype) -> list[Any]:
    kind, B, H = (case[name] for name in ("kind", "B", "H"))
    values = Values(case["seed"])
    x = values.normal(B, case["I"], dtype=case["dtype"])
    states = [values.normal(B, H, dtype=case["dtype"]) for _ in range(2 if kind == "lstm" else 1)]
    tensors = [x, *states, *weights(case, values, 0)[:4]]
    tensors = [None if t is None else t.to(dtype) for t in tensors]
    extra = {"nonlinearity": nonlinearity(case)} if kind == "rnn" else {}

    def call(x: Tensor, *rest: Any) -> Any:
        module = ops if is_ours else reference
        if kind == "lstm":
            return module.lstm_cell(x, rest[:2], *rest[2:])
        return getattr(module, f"{kind}_cell")(x, *rest, **extra)

    n = len(tensors)
    return results(call, tensors, case["layouts"][:n], case["wanted"][:n], upstream(case))


@on_backends
@calls
@given(data=st.data())
def test_cells(backend: Any, data: Any) -> None:
    case = data.draw(cases(backend.tiny, steps=False))
    torch.set_num_threads(case["threads"])
    dtype = case["dtype"]
    compare(
        run_cell(case, True, dtype),
        run_cell(case, False, dtype),
        run_cell(case, False, torch.float64),
        dtype,
    )
