"""Random calls of PyTorch's modules and functions with and without `seqkern.accelerate`: the same
results, and the same errors where arguments do not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkern
from fuzz.drawing import LAYOUTS, SEEDS, THREADS, Values, calls, laid_out, sizes
from seqkern.dropin import conditions
from seqkern.dropin.counts import counting

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
#: Of bfloat16 dtype, shape and what is finite are compared alone: there ours and PyTorch's numbers
#: are as far from each other as from the truth, with which the ops' own tests compare them.
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-10, torch.bfloat16: torch.inf}


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or its error."""
    try:
        return call()
    except Exception as error:
        return error


def assert_same(ours: Any, theirs: Any, dtype: torch.dtype, path: str = "result") -> None:
    if isinstance(theirs, Exception) or isinstance(ours, Exception):
        assert type(ours) is type(theirs), f"{path}: {ours!r}, PyTorch {theirs!r}"
    elif isinstance(theirs, PackedSequence):
        assert_same(list(ours), list(theirs), dtype, path)
    elif isinstance(theirs, tuple | list):
        assert len(ours) == len(theirs)
        for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, dtype, f"{path}[{n}]")
    elif isinstance(theirs, Tensor):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), path
        assert ours.requires_grad == theirs.requires_grad, path
        a, b = ours.detach().double(), theirs.detach().double()
        assert torch.equal(a.isfinite(), b.isfinite()), path
        scale = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
        error = (a - b).nan_to_num(0.0).abs().max().item() if b.numel() else 0.0
        assert error <= TOLERANCE[dtype] * max(scale, 1.0), f"{path}: {error:.3g} of {scale:.3g}"
    else:
        assert ours == theirs, path


def both(
    call: Callable[[list[Tensor]], Any],
    leaves: list[Tensor],
    dtype: torch.dtype,
    fits: bool,
    parameters: Sequence[Tensor] = (),
) -> None:
    """`call` with and without acceleration, and the gradients of the leaves and of a module's
    parameters; on our kernels where it `fits`, as the count of calls says."""

    def run() -> list[Any]:
        own = [t.detach().clone().requires_grad_() for t in leaves]
        result = outcome(lambda: call(own))
        outputs = [o for o in _tensors(result) if o.requires_grad]
        grads: list[Any] = []
        if outputs:
            values = Values(7)
            ups = [values.normal(*o.shape, dtype=o.dtype) for o in outputs]
            by = [*own, *parameters]
            grads = list(torch.autograd.grad(outputs, by, ups, allow_unused=True))
        return [result, grads]

    theirs = run()
    with seqkern.accelerate(), counting() as counts:
        ours = run()
    assert [reason == "" for _, reason in counts] == [fits], counts
    assert_same(ours, theirs, dtype)


def _tensors(result: Any) -> Any:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, PackedSequence):
        yield result.data
    elif isinstance(result, tuple | list):
        for part in result:
            yield from _tensors(part)


RECURRENT = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["LSTM", "GRU", "RNN"]),
        "I": sizes(9, 40),
        "H": sizes(9, 70),
        "layers": st.integers(1, 3),
        "bidirectional": st.booleans(),
        "batch_first": st.booleans(),
        "bias": st.booleans(),
        "proj_size": st.one_of(st.just(0), sizes(8)),
        "nonlinearity": st.sampled_from(["tanh", "relu"]),
        "T": sizes(4, 30),
        "B": st.one_of(st.none(), sizes(4, 20)),
        "packed": st.sampled_from([None, "sorted", "unsorted"]),
        "state": st.sampled_from([None, None, *["right"] * 4, "wrong batch", "one", "list"]),
        "wrong_width": st.sampled_from([False, False, False, True]),
        "training": st.booleans(),
        "dtype": DTYPES,
        "layout": LAYOUTS,
        "threads": THREADS,
        "seed": SEEDS,
    }
).filter(
    # PyTorch 2.13 takes a packed sequence of another width or batch than its state, and reads and
    # writes beside its tensors.
    lambda c: not (c["packed"] and (c["wrong_width"] or c["state"] == "wrong batch"))
)


@calls
@given(case=RECURRENT)
def test_recurrent_modules(case: dict[str, Any]) -> None:
    torch.set_num_threads(case["threads"])
    torch.manual_seed(case["seed"])
    values = Values(case["seed"])
    kind, dtype, H, T, B = (case[name] for name in ("kind", "dtype", "H", "T", "B"))
    extra: dict[str, Any] = {}
    if kind == "RNN" and dtype != torch.bfloat16:
        extra["nonlinearity"] = case["nonlinearity"]
    if kind == "LSTM" and case["proj_size"] < H:
        extra["proj_size"] = case["proj_size"]
    shared = {name: case[name] for name in ("bidirectional", "batch_first", "bias")}
    module: torch.nn.Module = getattr(torch.nn, kind)(
        case["I"], H, case["layers"], **shared, **extra
    )
    module.to(dtype).train(case["training"])
    width = case["I"] + case["wrong_width"]
    time_first = (T, width) if B is None else (T, B, width)
    x = values.normal(*time_first, dtype=dtype)
    if B is not None and case["batch_first"]:
        x = x.transpose(0, 1)
    lengths = None
    if case["packed"] and B is not None:
        lengths = values.integers(1, T + 1, B)
        if case["packed"] == "sorted":
            lengths = lengths.sort(descending=True).values
    directions = case["layers"] * (2 if case["bidirectional"] else 1)
    rows = [] if B is None else [B + (case["state"] == "wrong batch")]
    h = values.normal(directions, *rows, extra.get("proj_size") or H, dtype=dtype)
    c = values.normal(directions, *rows, H, dtype=dtype)

    def call(leaves: list[Tensor]) -> Any:
        x, h, c = leaves
        state: Any = None
        if case["state"]:
            state = (h, c) if kind == "LSTM" else h
            if case["state"] == "one":
                state = h
            elif case["state"] == "list":
                state = list(state) if kind == "LSTM" else [h]
        given: Any = laid_out(x, case["layout"])
        if lengths is not None:
            given = pack_padded_sequence(
                given, lengths, case["batch_first"], case["packed"] == "sorted"
            )
        return module(given, state)

    is_small = kind == "RNN" and dtype != torch.bfloat16 and T == 1 and lengths is None
    is_state = case["state"] in (None, "right", "list" if kind == "LSTM" else "one")
    if B is None and case["state"] == "wrong batch":
        is_state = True  # there is no batch
    fits = is_state and not case["wrong_width"] and not is_small
    both(call, [x, h, c], dtype, fits, list(module.parameters()))


ATTENTION = st.fixed_dictionaries(
    {
        "B": sizes(3),
        "NH": st.sampled_from([1, 2, 4, 6]),
        "NKV": st.sampled_from([1, 2, 3, 4]),
        "same_heads": st.sampled_from([True, True, False]),
        "Tq": sizes(5, 80),
        "Tk": st.one_of(st.none(), st.none(), sizes(5, 80)),
        "D": sizes(9, 80, 300),
        "Dv": st.one_of(st.none(), st.none(), st.none(), sizes(80)),
        "is_causal": st.sampled_from([*[True] * 7, False]),
        "scale": st.sampled_from([None, 0.2]),  # of 0 and less PyTorch makes NaN
        "enable_gqa": st.booleans(),
        "mask": st.sampled_from([False, False, False, True]),
        "dims": st.sampled_from([*[4] * 6, 3, 5]),
        "dtype": DTYPES,
        "layouts": st.lists(LAYOUTS, min_size=3, max_size=3),
        "threads": THREADS,
        "seed": SEEDS,
    }
)


@calls
@given(case=ATTENTION)
def test_scaled_dot_product_attention(case: dict[str, Any]) -> None:
    torch.set_num_threads(case["threads"])
    values = Values(case["seed"])
    heads = case["NH"] if case["same_heads"] else case["NKV"]
    Tq, D = case["Tq"], case["D"]
    Tk, Dv = case["Tk"] or Tq, case["Dv"] or D
    first = [case["B"]] if case["dims"] == 4 else [2, case["B"]] if case["dims"] == 5 else []
    shapes = [(*first, case["NH"], Tq, D), (*first, heads, Tk, D), (*first, heads, Tk, Dv)]
    qkv = [values.normal(*shape, dtype=case["dtype"]) for shape in shapes]
    mask = values.normal(Tq, Tk, dtype=torch.float32) > 0 if case["mask"] else None
    options = {name: case[name] for name in ("is_causal", "scale", "enable_gqa")}

    def call(leaves: list[Tensor]) -> Any:
        given = [laid_out(t, layout) for t, layout in zip(leaves, case["layouts"], strict=True)]
        return F.scaled_dot_product_attention(*given, mask, **options)

    is_grouped = heads == case["NH"] or (case["enable_gqa"] and case["NH"] % heads == 0)
    fits = case["is_causal"] and mask is None and case["dims"] == 4 and is_grouped
    both(call, qkv, case["dtype"], fits and Tk == Tq and Dv == D and D <= 256)


LOSSES = st.fixed_dictionaries(
    {
        "batch": st.one_of(st.none(), sizes(4, 40, least=0)),
        "rest": st.lists(sizes(3, 20, least=0), max_size=2),
        "V": sizes(5, 100),
        "target": st.sampled_from([*["int64"] * 5, "int32", "float32", *["probabilities"] * 3]),
        "wrong_shape": st.sampled_from([False, False, False, True]),
        "out_of_range": st.sampled_from([False, False, False, True]),
        "weight": st.sampled_from([*[None, "right"] * 4, "wrong size", "wrong dtype"]),
        "ignore_index": st.sampled_from([-100, 0, 2]),
        "reduction": st.sampled_from([*["none", "mean", "sum"] * 3, "avg"]),
        "label_smoothing": st.sampled_from([*[0.0, 0.1, 1.0] * 3, 1.5]),
        "dtype": DTYPES,
        "layouts": st.lists(LAYOUTS, min_size=2, max_size=2),
        "threads": THREADS,
        "seed": SEEDS,
    }
)


@calls
@given(case=LOSSES)
def test_cross_entropy(case: dict[str, Any]) -> None:
    torch.set_num_threads(case["threads"])
    values = Values(case["seed"])
    V, dtype = case["V"], case["dtype"]
    batch = [] if case["batch"] is None else [case["batch"]]
    rest = case["rest"] if batch else []
    logits = values.normal(*batch, V, *rest, dtype=dtype)
    rows = [*batch, *rest]
    if case["wrong_shape"]:
        rows = [*rows, 2]
    if case["target"] == "probabilities":
        target = values.normal(*batch, V, *rest, dtype=torch.float32).abs().to(dtype)
    else:
        kind = getattr(torch, case["target"])
        target = values.integers(0, V + case["out_of_range"], *rows).to(kind)
    weight = None
    if case["weight"]:
        of = torch.float16 if case["weight"] == "wrong dtype" else dtype
        weight = values.normal(V + (case["weight"] == "wrong size"), dtype=of).abs()
    options = {name: case[name] for name in ("ignore_index", "reduction", "label_smoothing")}

    def call(leaves: list[Tensor]) -> Any:
        given, other = leaves[0], target
        given, other = (
            laid_out(t, layout) for t, layout in zip((given, other), case["layouts"], strict=True)
        )
        return F.cross_entropy(given, other, weight, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(conditions.LARGE, "cross_entropy", 0)
        is_target = case["target"] == "int64" and not case["wrong_shape"]
        if case["target"] == "probabilities":
            is_target = case["ignore_index"] < 0
        fits = is_target and case["weight"] in (None, "right") and case["reduction"] != "avg"
        fits = fits and case["label_smoothing"] <= 1 and logits.numel() > 0
        both(call, [logits], dtype, fits)
