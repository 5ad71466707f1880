"""ops.lstm reading tokens: what it gives for one-hot vectors, on every backend that has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_lstm import exact, make, ours, theirs
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from recurrent import DTYPES, compare, run, some_lengths
from seqkern import ops

#: T, B, V, H: one token, widths that are no multiple of a vector, more tokens than are added up at
#: a time.
SHAPES = [(1, 1, 1, 1), (3, 2, 5, 7), (9, 17, 4, 40), (2, 3, 11, 129), (60, 20, 2, 9)]

#: On the emulator the weights' gradients are sums of ATen on the CPU: neither ours nor CUDA's.
EMULATED = {(60, 20, 2, 9): (36, 15, 2, 9)}


def one_hot(function: Any) -> Any:
    """`function` of one-hot vectors in place of the tokens."""

    def forward(tokens: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, *rest: Tensor) -> Any:
        x = F.one_hot(tokens.long(), w_ih.shape[1]).to(w_ih.dtype)
        return function(x, h0, c0, w_ih, *rest)

    return forward


def tokens_of(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, **options: Any):  # type: ignore[no-untyped-def]
    """tokens, then what `make` gives for floating input."""
    T, B, V, _ = shape
    tensors = make(shape, dtype, device, **options)
    w_ih = tensors[3]
    assert w_ih is not None
    tensors[3] = w_ih.t().contiguous().t()  # as a table of V rows
    return [torch.randint(V, (T, B), device=device), *tensors[1:]]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_torch(
    backend: Any, dtype: torch.dtype, shape: tuple[int, int, int, int], reverse: bool
) -> None:
    shape = EMULATED.get(shape, shape) if backend.tiny else shape
    compare(
        *(ours(reverse), one_hot(theirs(reverse)), exact(reverse)),
        lambda: tokens_of(shape, dtype, backend.device),
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("P", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(backend: Any, dtype: torch.dtype, P: int, state: bool, reverse: bool) -> None:
    lengths = some_lengths(6, 9, backend.device)
    compare(
        *(ours(reverse, lengths), one_hot(theirs(reverse, lengths)), exact(reverse, lengths)),
        lambda: tokens_of((9, 6, 4, 7), dtype, backend.device, P=P, state=state),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_tokens(dtype: torch.dtype) -> None:
    """More bytes of gates than backward takes at a time, of few numbers: long sums."""
    compare(
        *(ours(), one_hot(theirs()), exact()),
        lambda: tokens_of((41, 900, 3, 32), dtype, "cpu", state=False),
    )


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_equals_one_hot(backend: Any, recompute: bool, lengths: bool) -> None:
    tensors = tokens_of((7, 5, 3, 9), torch.float64, backend.device)
    given = some_lengths(5, 7, backend.device) if lengths else None
    function = ours(True, given, recompute=recompute, return_cells=True)
    found = run(function, tensors)
    for actual, expected in zip(found, run(one_hot(function), tensors), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("view", ["int32", "columns", "weight", "row-major"])
def test_layouts(backend: Any, view: str) -> None:
    tensors = tokens_of((4, 3, 5, 6), torch.float64, backend.device)
    expected = run(ours(), tensors)
    if view == "int32":
        tensors[0] = tensors[0].int()
    elif view == "columns":
        tensors[0] = tensors[0].t().contiguous().t()
    elif view == "weight":
        tensors[3] = torch.stack([tensors[3], tensors[3]], -1)[..., 0]
    else:
        tensors[3] = tensors[3].contiguous()
    for actual, truth in zip(run(ours(), tensors), expected, strict=True):
        torch.testing.assert_close(actual, truth)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_never_read(backend: Any, reverse: bool, recompute: bool) -> None:
    """What stands there may be no token at all."""
    tensors = tokens_of((5, 3, 4, 6), torch.float64, backend.device)
    lengths = torch.tensor([2, 0, 5], device=backend.device)
    function = ours(reverse, lengths, recompute=recompute)
    expected = run(function, tensors)
    padding = torch.arange(5, device=backend.device).unsqueeze(-1) >= lengths
    for bad in (-100, 2**40):
        changed = [tensors[0].masked_fill(padding, bad), *tensors[1:]]
        for actual, truth in zip(run(function, changed), expected, strict=True):
            assert torch.equal(actual, truth)


def test_unused_tokens_get_a_zero_gradient(backend: Any) -> None:
    tensors = tokens_of((4, 3, 9, 6), torch.float32, backend.device)
    tensors[0] = torch.full_like(tensors[0], 7)
    tensors[3].requires_grad_()
    ours()(*tensors)[0].sum().backward()
    grad = tensors[3].grad
    assert grad[:, 7].abs().min() > 0
    assert not torch.cat([grad[:, :7], grad[:, 8:]], -1).any()


def test_inference_is_the_same(backend: Any) -> None:
    tensors = tokens_of((4, 3, 9, 6), torch.float32, backend.device)
    leaves = [tensors[0], *(t if t is None else t.requires_grad_() for t in tensors[1:])]
    expected = ours()(*leaves)
    with torch.no_grad():
        for actual, truth in zip(ours()(*tensors), expected, strict=True):
            assert torch.equal(actual, truth)


# ---------------------------------------------------------------- autograd, compile, opcheck


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(backend: Any, recompute: bool, lengths: bool) -> None:
    tensors = tokens_of((3, 2, 3, 4), torch.float64, backend.device)
    given = torch.tensor([2, 3], device=backend.device) if lengths else None
    leaves = [t.requires_grad_() for t in tensors[1:7]]

    def function(*present: Tensor) -> Any:
        call = ours(lengths=given, recompute=recompute, return_cells=True)
        return tuple(call(tensors[0], *present))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend: Any, dtype: torch.dtype, lengths: bool) -> None:
    raw: Any = backend.ops
    tensors = tokens_of((3, 2, 4, 5), dtype, backend.device)
    given = torch.full((2,), 3, device=backend.device) if lengths else None
    for save in ((True, True), (False, False)):
        opcheck(raw.lstm_forward.default, (*tensors, given, False, *save))
    output, h_n, c_n, cells, gates = raw.lstm_forward(*tensors, given, True, True, True)
    grads = [torch.ones_like(t) for t in (output, h_n, c_n, cells)]
    saved = (tensors[7], given, output, cells, gates, True, True)
    for needs in (126, 8, 2):
        opcheck(raw.lstm_backward.default, (*grads, *tensors[:5], *saved, needs))
    leaves = [t if t is None or i == 0 else t.requires_grad_() for i, t in enumerate(tensors)]
    opcheck(raw.lstm.default, (*leaves, given, False, True, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend: Any, dynamic: bool) -> None:
    def step(*tensors: Tensor) -> list[Tensor]:
        output, h, c = ours()(tensors[0], *tensors[1:])
        return [3 * output, h, c]

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (4, 6):
        tensors = tokens_of((T, 3, 5, 6), torch.float32, backend.device)
        for actual, expected in zip(run(compiled, tensors), run(step, tensors), strict=True):
            torch.testing.assert_close(actual, expected)


# ---------------------------------------------------------------- threads, errors


@pytest.mark.parametrize("lengths", [False, True])
def test_bits_do_not_depend_on_threads(lengths: bool) -> None:
    tensors = tokens_of((9, 70, 24, 80), torch.float32, "cpu")
    given = some_lengths(70, 9, "cpu") if lengths else None
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(run(ours(lengths=given), tensors))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("bad", [-1, 5])
def test_tokens_out_of_range(bad: int) -> None:
    tensors = tokens_of((4, 3, 5, 6), torch.float32, "cpu")
    tensors[0][2, 1] = bad
    text = rf"lstm: input must be in \[0, 5\), got {bad} at \[2, 1\]"
    with pytest.raises(ValueError, match=text):
        ours()(*tensors)


BAD_CALLS: dict[str, tuple[int, Any, str]] = {
    "three-dimensions": (
        *(0, lambda x: x[..., None]),
        r"input must be float32, float64, float16 or bfloat16, got int64 \[4, 3, 1\]",
    ),
    "one-dimension": (0, lambda x: x[0], r"input must be \[T, B\], got int64 \[3\]"),
    "no-steps": (0, lambda x: x[:0], r"input must have at least one step, got int64 \[0, 3\]"),
    "int16": (
        *(0, lambda x: x.short()),
        r"input must be float32, float64, float16 or bfloat16, got int16 \[4, 3\]",
    ),
    "w_ih-dtype": (
        *(3, lambda w: w.long()),
        r"w_ih must be float32, float64, float16 or bfloat16, got int64 \[24, 5\]",
    ),
    "w_hh-dtype": (4, lambda w: w.half(), r"w_hh must be float32 \[24, 6\], got float16 \[24, 6\]"),
    "h0": (1, lambda h: h[:2], r"h0 must be float32 \[3, 6\], got float32 \[2, 6\]"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(backend: Any, name: str) -> None:
    position, change, text = BAD_CALLS[name]
    tensors = tokens_of((4, 3, 5, 6), torch.float32, backend.device)
    tensors[position] = change(tensors[position])
    with pytest.raises(ValueError, match=text):
        ops.lstm(tensors[0], (tensors[1], tensors[2]), *tensors[3:])
