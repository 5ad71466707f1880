"""ops.gru and ops.rnn against PyTorch and the float64 reference, on every backend."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hidden_cases import CELLS, exact, make, ours, theirs
from torch import Tensor
from torch.library import opcheck

from recurrent import DTYPES, SHAPES, TINY_SHAPES, compare, run, some_lengths

pytestmark = pytest.mark.parametrize("cell", CELLS)


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for actual, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, truth)


# ---------------------------------------------------------------- parity


# T, B, input width D, H of a real device, and of the emulator, whose threads take their time.
SIZES = {str(real): (real, tiny) for real, tiny in zip(SHAPES, TINY_SHAPES, strict=True)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_torch(backend: Any, cell: str, dtype: torch.dtype, size: str) -> None:
    functions = (f(cell) for f in (ours, theirs, exact))
    shape = SIZES[size][backend.tiny]
    compare(*functions, lambda: make(cell, shape, dtype, backend.device))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_options_match_torch(backend: Any, cell: str, dtype: torch.dtype, bias: bool) -> None:
    functions = (f(cell, reverse=True) for f in (ours, theirs, exact))
    tensors = lambda: make(cell, (4, 3, 5, 18), dtype, backend.device, bias=bias, state=bias)  # noqa: E731
    compare(*functions, tensors)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_match_packed_sequences(
    backend: Any, cell: str, dtype: torch.dtype, state: bool, reverse: bool
) -> None:
    T = 4 if backend.tiny else 9
    lengths = some_lengths(6, T, backend.device)
    functions = (f(cell, reverse=reverse, lengths=lengths) for f in (ours, theirs, exact))
    compare(*functions, lambda: make(cell, (T, 6, 4, 7), dtype, backend.device, state=state))


def test_nan_goes_where_it_goes_in_torch(backend: Any, cell: str) -> None:
    """Into what follows, and back into the gradients: a run that diverged shows it."""
    tensors = make(cell, (4, 3, 5, 9), torch.float64, backend.device)
    assert tensors[0] is not None
    tensors[0][2, 1, 0] = torch.nan
    found, expected = run(ours(cell), tensors), run(theirs(cell), tensors)
    assert any(t.isnan().any() for t in found)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, equal_nan=True)


@pytest.mark.parametrize("view", ["batch-first", "wide", "expanded-gradient"])
def test_strides(backend: Any, cell: str, view: str) -> None:
    x, *rest = make(cell, (6, 4, 5, 9), torch.float64, backend.device)
    assert x is not None
    views: dict[str, Any] = {
        "batch-first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "wide": lambda t: torch.stack((t, t), -1)[..., 0],
        "expanded-gradient": lambda t: t,
    }
    strided = views[view](x).detach().requires_grad_()
    assert view == "expanded-gradient" or not strided.is_contiguous()
    y = x.detach().requires_grad_()
    outputs = ours(cell)(strided, *rest)[0], exact(cell)(y, *rest)[0]
    torch.testing.assert_close(*outputs)
    grads = [torch.autograd.grad(o.sum(), i)[0] for o, i in zip(outputs, (strided, y), strict=True)]
    torch.testing.assert_close(*grads)


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_empty_rows_keep_their_state(backend: Any, cell: str, dtype: torch.dtype) -> None:
    tensors = make(cell, (4, 3, 2, 5), torch.float64, backend.device)
    lengths = torch.tensor([0, 4, 0], device=backend.device)
    found = run(ours(cell, lengths=lengths.to(dtype)), tensors)
    assert_close(found, run(exact(cell, lengths=lengths), tensors))
    assert torch.equal(found[1][0], tensors[1][0])  # type: ignore[index]


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_never_read(backend: Any, cell: str, reverse: bool) -> None:
    x, *rest = make(cell, (6, 4, 3, 9), torch.float32, backend.device)
    assert x is not None
    lengths = some_lengths(4, 6, backend.device)
    padding = torch.arange(6, device=x.device).unsqueeze(-1) >= lengths
    results = []
    for filling in (1.0, torch.nan):
        x[padding] = filling
        function = ours(cell, reverse=reverse, lengths=lengths)
        results.append(run(partial(function, x.clone()), rest))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_row_does_not_depend_on_its_padding(
    backend: Any, cell: str, reverse: bool, dtype: torch.dtype
) -> None:
    """A row of length L gives the bits of the same row in a sequence of L steps."""
    x, *rest = make(cell, (7, 5, 18, 20), dtype, backend.device)
    assert x is not None
    short = x[:3].clone()
    with torch.no_grad():
        lengths = torch.tensor([3, 7, 1, 5, 5], device=backend.device)
        output, h_n = ours(cell, reverse=reverse, lengths=lengths)(x, *rest)
        for others in ([3, 1, 3, 3], [0, 0, 0, 0]):
            lengths = torch.tensor([3, *others], device=backend.device)
            alone, h_alone = ours(cell, reverse=reverse, lengths=lengths)(short, *rest)
            assert torch.equal(output[:3, 0], alone[:, 0])
            assert torch.equal(h_n[0], h_alone[0])


# ---------------------------------------------------------------- autograd, compile, opcheck


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse-lengths": {"reverse": True, "lengths": True},
    "no-bias-no-state": {"bias": False, "state": False, "lengths": True},
}


def differentiable(backend: Any, cell: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A function of the tensors that are there, and those tensors."""
    options = dict(options)
    created = {k: options.pop(k) for k in ("bias", "state") if k in options}
    tensors = make(cell, (3, 2, 2, 3), torch.float64, backend.device, **created)
    if options.pop("lengths", False):
        options["lengths"] = torch.tensor([2, 3], device=backend.device)
    given = [t is not None for t in tensors]

    def function(*present: Tensor) -> Any:
        source = iter(present)
        return ours(cell, **options)(*[next(source) if g else None for g in given])

    return function, tuple(t.requires_grad_() for t in tensors if t is not None)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(backend: Any, cell: str, options: dict[str, Any]) -> None:
    function, tensors = differentiable(backend, cell, options)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_second_derivative_of_some_inputs(backend: Any, cell: str) -> None:
    """A gradient penalty: weights frozen but one, a gradient of the input that is used again."""
    tensors: Any = make(cell, (3, 2, 3, 4), torch.float64, backend.device)
    tensors[0].requires_grad_()
    tensors[3].requires_grad_()

    def penalty(function: Any) -> Tensor:
        (gradient,) = torch.autograd.grad(
            function(*tensors)[0].sum(), tensors[0], create_graph=True
        )
        (result,) = torch.autograd.grad(gradient.square().sum(), tensors[3])
        return result

    torch.testing.assert_close(penalty(ours(cell)), penalty(exact(cell)))


@pytest.mark.parametrize(
    ("dtype", "lengths"), [(torch.float32, True), (torch.bfloat16, False)], ids=str
)
def test_opcheck(backend: Any, cell: str, dtype: torch.dtype, lengths: bool) -> None:
    raw: Any = backend.ops
    name = "gru" if cell == "gru" else "rnn"
    op, forward, backward = (getattr(raw, name + end) for end in ("", "_forward", "_backward"))
    tensors: Any = make(cell, (3, 2, 4, 5), dtype, backend.device)
    given = some_lengths(2, 3, backend.device) if lengths else None
    # Where gates would have padding they are unspecified, and opcheck compares them.
    full = None if given is None else torch.full_like(given, 3)
    option = cell == "relu"  # and save_gates
    opcheck(forward.default, (*tensors, given, False, option))
    opcheck(forward.default, (*tensors, full, False, True))
    output, h_n, *saved = forward(*tensors, given, True, cell != "tanh")
    grads = (torch.ones_like(output), torch.ones_like(h_n))
    options = (True, True) if cell == "gru" else (True, cell == "relu")
    for needs in (63, 1, 32) if cell == "gru" else (31, 1, 16):
        opcheck(backward.default, (*grads, *tensors[:4], given, output, *saved, *options, needs))
    leaves = [t.requires_grad_() for t in tensors]
    opcheck(op.default, (*leaves, given, False, option))
    opcheck(op.default, (*leaves, full, False, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend: Any, cell: str, dynamic: bool) -> None:
    def step(*tensors: Tensor) -> list[Tensor]:
        output, h = ours(cell)(2 * tensors[0], *tensors[1:])
        return [3 * output, h]

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (4, 6):
        tensors = make(cell, (T, 3, 5, 6), torch.float32, backend.device)
        assert_close(run(compiled, tensors), run(step, tensors))


def test_output_changed_before_backward(backend: Any, cell: str) -> None:
    tensors: Any = make(cell, (3, 2, 4, 5), torch.float32, backend.device)
    tensors[3].requires_grad_()
    output = ours(cell)(*tensors)[0]
    with torch.no_grad():
        output.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_frozen_inputs_get_no_gradient(backend: Any, cell: str) -> None:
    tensors: Any = make(cell, (3, 2, 4, 5), torch.float32, backend.device)
    tensors[5].requires_grad_()
    ours(cell)(*tensors)[0].sum().backward()
    assert [t.grad is not None for t in tensors] == [i == 5 for i in range(6)]


def test_backward_twice(backend: Any, cell: str) -> None:
    """What forward saved is not used up."""
    tensors: Any = make(cell, (3, 2, 4, 5), torch.float32, backend.device)
    tensors[0].requires_grad_()
    output = ours(cell)(*tensors)[0].sum()
    first, second = (
        torch.autograd.grad(output, tensors[0], retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_batch_without_rows(backend: Any, cell: str, reverse: bool, lengths: bool) -> None:
    tensors = make(cell, (3, 0, 4, 5), torch.float32, backend.device)
    given = torch.zeros(0, dtype=torch.int64, device=backend.device) if lengths else None
    found = run(ours(cell, reverse=reverse, lengths=given), tensors)
    assert_close(found, run(exact(cell, reverse=reverse), tensors))


@pytest.mark.parametrize("T", [3, 9])  # few and many rows
def test_input_without_features(backend: Any, cell: str, T: int) -> None:
    tensors = make(cell, (T, 4, 0, 5), torch.float32, backend.device)
    assert_close(run(ours(cell), tensors), run(exact(cell), tensors))


# ---------------------------------------------------------------- threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 40, 24, 80), (9, 3, 70, 260), (6, 16, 96, 130)], ids=str)
@pytest.mark.parametrize("lengths", [False, True])
def test_bits_do_not_depend_on_threads(
    cell: str, dtype: torch.dtype, shape: tuple[int, int, int, int], lengths: bool
) -> None:
    """The CPU kernel's own results: those of ATen's products around it are ATen's."""
    tensors = make(cell, shape, dtype, "cpu")
    given = some_lengths(shape[1], shape[0], "cpu") if lengths else None
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5, 2):
            torch.set_num_threads(count)
            leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
            outputs = ours(cell, lengths=given)(*leaves)
            grads = torch.autograd.grad([o.sum() for o in outputs], leaves[:2])
            results.append([*outputs, *grads])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)
