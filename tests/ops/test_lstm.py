"""ops.lstm against PyTorch and the float64 reference, on every backend that has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from recurrent import DTYPES, SHAPES, compare, flip, run, some_lengths, weights
from seqkern import ops, reference


def make(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    *,
    P: int = 0,
    bias: bool = True,
    state: bool = True,
) -> list[Tensor | None]:
    """input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr."""
    T, B, D, H = shape
    normal: Any = lambda *size: torch.randn(*size).to(device, dtype)  # noqa: E731
    h0, c0 = (normal(B, P or H), normal(B, H)) if state else (None, None)
    return [normal(T, B, D), h0, c0, *weights(4, D, H, dtype, device, P, bias=bias)]


def ours(reverse: bool = False, lengths: Tensor | None = None, **options: Any) -> Any:
    def forward(
        input: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, *rest: Tensor
    ) -> list[Tensor]:
        state = None if h0 is None else (h0, c0)
        output, last, *cells = ops.lstm(
            input, state, w_ih, w_hh, *rest, lengths=lengths, reverse=reverse, **options
        )
        return [output, *last, *cells]

    return forward


def exact(reverse: bool = False, lengths: Tensor | None = None, cells: bool = False) -> Any:
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = reference.lstm(*tensors, lengths=lengths, reverse=reverse)
        return result if cells else result[:3]

    return forward


def theirs(reverse: bool = False, lengths: Tensor | None = None) -> Any:
    """torch's own LSTM: its bidirectional one stands in for a reversed direction."""

    def forward(
        input: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, *rest: Tensor
    ) -> list[Tensor]:
        parameters = [w for w in (w_ih, w_hh, *rest) if w is not None]
        bias = rest[0] is not None
        B, H, P = input.shape[1], w_hh.shape[0] // 4, w_hh.shape[1]
        if h0 is None:
            h0, c0 = input.new_zeros(B, P), input.new_zeros(B, H)
        x = input if lengths is None or not reverse else flip(input, lengths)
        x = x.flip(0) if reverse and lengths is None else x
        arguments = ([h0[None], c0[None]], parameters, bias, 1, 0.0, True, False)
        if lengths is None:
            output, h, c = torch.lstm(x, *arguments, False)
            output = output.flip(0) if reverse else output
        else:
            packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
            order = packed.sorted_indices
            state = [h0[None].index_select(1, order), c0[None].index_select(1, order)]
            data, h, c = torch.lstm(packed.data, packed.batch_sizes, state, *arguments[1:])
            packed = packed._replace(data=data)
            output, _ = pad_packed_sequence(packed, total_length=input.shape[0])
            output = flip(output, lengths) if reverse else output
            h, c = (s.index_select(1, packed.unsorted_indices) for s in (h, c))
        return [output, h[0], c[0]]

    return forward


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_torch(
    backend: Any, dtype: torch.dtype, shape: tuple[int, int, int, int], reverse: bool
) -> None:
    compare(
        ours(reverse), theirs(reverse), exact(reverse), lambda: make(shape, dtype, backend.device)
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        # More rows in all than are added up at a time, and panels that are not full.
        *(((13, 50, 37, 41), dtype) for dtype in DTYPES),
        # More bytes of gates than backward takes at a time.
        *(((41, 900, 5, 32), dtype) for dtype in (torch.float32, torch.float64)),
    ],
    ids=str,
)
def test_many_tokens(
    shape: tuple[int, int, int, int], dtype: torch.dtype, state: bool, reverse: bool
) -> None:
    compare(
        *(ours(reverse), theirs(reverse), exact(reverse)),
        lambda: make(shape, dtype, "cpu", state=state),
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("P", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_match_packed_sequences(
    backend: Any, dtype: torch.dtype, P: int, state: bool, reverse: bool
) -> None:
    lengths = some_lengths(6, 9, backend.device)
    functions = (f(reverse, lengths) for f in (ours, theirs, exact))
    compare(*functions, lambda: make((9, 6, 4, 7), dtype, backend.device, P=P, state=state))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("P", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_match_torch(backend: Any, dtype: torch.dtype, P: int, bias: bool) -> None:
    compare(
        *(ours(), theirs(), exact()),
        lambda: make((4, 3, 5, 18), dtype, backend.device, P=P, bias=bias),
    )


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_recompute(backend: Any, state: bool, reverse: bool, lengths: bool) -> None:
    tensors = make((7, 5, 3, 9), torch.float64, backend.device, state=state)
    given = some_lengths(5, 7, backend.device) if lengths else None
    found = run(ours(reverse, given, recompute=True), tensors)
    for actual, expected in zip(found, run(exact(reverse, given), tensors), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("P", [0, 4])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
def test_cells_and_their_gradient(backend: Any, lengths: bool, reverse: bool, P: int) -> None:
    tensors = make((6, 4, 3, 9), torch.float64, backend.device, P=P)
    given = some_lengths(4, 6, backend.device) if lengths else None
    found = run(ours(reverse, given, return_cells=True), tensors)
    expected = run(exact(reverse, given, cells=True), tensors)
    for actual, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, truth)


def test_cells_without_gradients(backend: Any) -> None:
    tensors = make((6, 4, 3, 9), torch.float64, backend.device)
    with torch.no_grad():
        results = ours(return_cells=True)(*tensors)
    for actual, truth in zip(results, exact(cells=True)(*tensors), strict=True):
        torch.testing.assert_close(actual, truth)


@pytest.mark.parametrize("view", ["batch-first", "wide", "expanded-gradient"])
def test_strides(backend: Any, view: str) -> None:
    tensors = make((6, 4, 5, 9), torch.float64, backend.device)
    x = tensors[0]
    assert x is not None
    views = {
        "batch-first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "wide": lambda t: torch.stack((t, t), -1)[..., 0],
        "expanded-gradient": lambda t: t,
    }
    strided = views[view](x).detach().requires_grad_()
    assert view == "expanded-gradient" or not strided.is_contiguous()
    output = ours()(strided, *tensors[1:])[0]
    y = x.detach().requires_grad_()
    truth = exact()(y, *tensors[1:])[0]
    torch.testing.assert_close(output, truth)
    gradients = [torch.autograd.grad(o.sum(), i)[0] for o, i in ((output, strided), (truth, y))]
    torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_empty_rows_keep_their_state(backend: Any, dtype: torch.dtype) -> None:
    tensors = make((4, 3, 2, 5), torch.float64, backend.device)
    lengths = torch.tensor([0, 4, 0], device=backend.device)
    found = run(ours(lengths=lengths.to(dtype)), tensors)
    for actual, truth in zip(found, run(exact(lengths=lengths), tensors), strict=True):
        torch.testing.assert_close(actual, truth)
    assert torch.equal(found[1][0], tensors[1][0])  # type: ignore[index]


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_never_read(backend: Any, reverse: bool) -> None:
    tensors = make((6, 4, 3, 9), torch.float32, backend.device)
    lengths = some_lengths(4, 6, backend.device)
    results = []
    for filling in (1.0, torch.nan):
        x = tensors[0].clone()  # type: ignore[union-attr]
        padding = torch.arange(6, device=x.device).unsqueeze(-1) >= lengths
        x[padding] = filling
        results.append(run(lambda *t, x=x: ours(reverse, lengths)(x, *t), tensors[1:]))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_row_does_not_depend_on_its_padding(
    backend: Any, reverse: bool, dtype: torch.dtype
) -> None:
    """A row of length L gives the bits of the same row alone, in a sequence of L steps."""
    x, *rest = make((7, 5, 18, 20), dtype, backend.device)
    assert x is not None
    short = x[:3].clone()
    with torch.no_grad():
        lengths = torch.tensor([3, 7, 1, 5, 5], device=backend.device)
        output, h_n, c_n = ours(reverse, lengths)(x, *rest)[:3]
        for others in ([3, 1, 3, 3], [0, 0, 0, 0]):
            lengths = torch.tensor([3, *others], device=backend.device)
            alone, h_alone, c_alone = ours(reverse, lengths)(short, *rest)[:3]
            assert torch.equal(output[:3, 0], alone[:, 0])
            assert torch.equal(h_n[0], h_alone[0])
            assert torch.equal(c_n[0], c_alone[0])


@pytest.mark.parametrize("T", [3, 9])  # few and many rows
def test_input_without_features(backend: Any, T: int) -> None:
    tensors = make((T, 4, 0, 5), torch.float32, backend.device)
    for found, expected in zip(run(ours(), tensors), run(exact(), tensors), strict=True):
        torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- autograd, compile, opcheck


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": {"reverse": True},
    "projection": {"P": 2},
    "lengths": {"lengths": True},
    "reverse-lengths-projection": {"reverse": True, "lengths": True, "P": 2},
    "recompute": {"recompute": True},
    "no-bias-no-state": {"bias": False, "state": False},
}


def differentiable(backend: Any, options: dict[str, Any]) -> tuple[Any, tuple[Tensor, ...]]:
    """A function of the tensors that are there, cells among its outputs, and those tensors."""
    options = dict(options)
    created = {k: options.pop(k) for k in ("P", "bias", "state") if k in options}
    tensors = make((3, 2, 3, 4), torch.float64, backend.device, **created)
    if options.pop("lengths", False):
        options["lengths"] = torch.tensor([2, 3], device=backend.device)
    given = [t is not None for t in tensors]

    def function(*present: Tensor) -> Any:
        source = iter(present)
        full = [next(source) if g else None for g in given]
        return tuple(ours(return_cells=True, **options)(*full))

    return function, tuple(t.requires_grad_() for t in tensors if t is not None)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(backend: Any, options: dict[str, Any]) -> None:
    function, tensors = differentiable(backend, options)
    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradgradcheck(backend: Any, options: dict[str, Any]) -> None:
    function, tensors = differentiable(backend, options)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_second_derivative_of_some_inputs(backend: Any) -> None:
    """A gradient penalty: weights frozen but one, a gradient of the input that is used again."""
    tensors = make((3, 2, 3, 4), torch.float64, backend.device)
    tensors[0].requires_grad_()  # type: ignore[union-attr]
    tensors[4].requires_grad_()  # type: ignore[union-attr]

    def penalty(function: Any) -> Tensor:
        (gradient,) = torch.autograd.grad(
            function(*tensors)[0].sum(), tensors[0], create_graph=True
        )
        (result,) = torch.autograd.grad(gradient.square().sum(), tensors[4])
        return result

    torch.testing.assert_close(penalty(ours()), penalty(exact()))


@pytest.mark.parametrize("P", [0, 3])
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend: Any, dtype: torch.dtype, lengths: bool, P: int) -> None:
    raw: Any = backend.ops
    tensors = make((3, 2, 4, 5), dtype, backend.device, P=P)
    given = some_lengths(2, 3, backend.device) if lengths else None
    # Where gates would have padding they are unspecified, and opcheck compares them.
    full = None if given is None else torch.full_like(given, 3)
    for save in ((False, True), (False, False)):
        opcheck(raw.lstm_forward.default, (*tensors, given, False, *save))
    opcheck(raw.lstm_forward.default, (*tensors, full, False, True, True))
    output, h_n, c_n, cells, gates = raw.lstm_forward(*tensors, given, True, True, True)
    grads = [torch.ones_like(t) for t in (output, h_n, c_n, cells)]
    saved = (tensors[7], given, output, cells, gates, True, True)
    for needs in (127, 1, 8):
        opcheck(raw.lstm_backward.default, (*grads, *tensors[:5], *saved, needs))
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    opcheck(raw.lstm.default, (*leaves, given, False, False, True))
    opcheck(raw.lstm.default, (*leaves, full, False, True, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend: Any, dynamic: bool) -> None:
    def step(*tensors: Tensor) -> list[Tensor]:
        output, h, c = ours()(2 * tensors[0], *tensors[1:])
        return [3 * output, h, c]

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (4, 6):
        tensors = make((T, 3, 5, 6), torch.float32, backend.device)
        for actual, expected in zip(run(compiled, tensors), run(step, tensors), strict=True):
            torch.testing.assert_close(actual, expected)


def test_output_changed_before_backward(backend: Any) -> None:
    tensors = make((3, 2, 4, 5), torch.float32, backend.device)
    tensors[3].requires_grad_()  # type: ignore[union-attr]
    output = ours()(*tensors)[0]
    with torch.no_grad():
        output.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_frozen_inputs_get_no_gradient(backend: Any) -> None:
    tensors = make((3, 2, 4, 5), torch.float32, backend.device)
    tensors[6].requires_grad_()  # type: ignore[union-attr]
    ours()(*tensors)[0].sum().backward()
    assert [t.grad is not None for t in tensors if t is not None] == [i == 6 for i in range(7)]


# ---------------------------------------------------------------- threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 40, 24, 80), (9, 3, 70, 260), (6, 16, 96, 130)], ids=str)
@pytest.mark.parametrize("lengths", [False, True])
def test_bits_do_not_depend_on_threads(
    dtype: torch.dtype, shape: tuple[int, int, int, int], lengths: bool
) -> None:
    """The CPU kernel's own results: those of ATen's products around it are ATen's."""
    tensors = make(shape, dtype, "cpu")
    given = some_lengths(shape[1], shape[0], "cpu") if lengths else None
    threads = torch.get_num_threads()
    raw: Any = torch.ops.seqkern
    results = []
    try:
        for count in (1, 2, 3, 5, 2):
            torch.set_num_threads(count)
            forward = raw.lstm_forward(*tensors, given, False, True, True)
            output, _, _, c, gates = forward
            grads = (torch.ones_like(output), None, None, torch.ones_like(c))
            saved = (tensors[7], given, output, c, gates, True, False)
            backward = raw.lstm_backward(*grads, *tensors[:5], *saved, 1 + 2 + 4)
            results.append([*forward[:4], *backward])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def test_torchs_own_products_find_their_registers_as_they_left_them() -> None:
    """PyTorch's products of bf16 and ours share the matrix unit where there is one."""
    a, b = (torch.randn(200, 300).bfloat16() for _ in range(2))
    tensors = make((4, 21, 40, 48), torch.bfloat16, "cpu")
    before = a @ b.T
    for _ in range(3):
        run(ours(), tensors)
        assert torch.equal(a @ b.T, before)
