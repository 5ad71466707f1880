"""ops.lstm_cell, gru_cell and rnn_cell against PyTorch and the float64 reference, on every backend
that has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from recurrent import DTYPES, compare, run, weights
from seqkern import ops, reference
from seqkern.ops._packed_weights import PackedWeights
from seqkern.ops.gru_cell import step as gru_step
from seqkern.ops.lstm_cell import step as lstm_step
from seqkern.ops.rnn_cell import step as rnn_step

#: B, input width D, H: rows read weights in place, or packed on the way.
SHAPES = [
    *((1, 1, 1), (3, 5, 7), (17, 3, 40), (1, 40, 96), (2, 9, 257)),
    *((6, 70, 20), (64, 33, 18), (65, 3, 5)),
    *((17, 32, 64), (31, 16, 48), (32, 48, 16)),  # whole vectors, whatever the instruction set
    *((40, 130, 140), (97, 20, 24), (300, 33, 20), (530, 5, 6)),  # columns, rows in pieces
    *((20, 40, 8), (20, 8, 40)),  # one weight deep enough for a matrix unit, the other not
]


@dataclass(frozen=True)
class Cell:
    """A cell as functions of input, its states and weights. `step` takes a packed copy, too; `more`
    are the arguments that its raw op ends with, `saved` says which results backward reads."""

    op: str
    gates: int
    states: int
    ours: Callable[..., Sequence[Tensor]]
    theirs: Callable[..., Sequence[Tensor]]
    exact: Callable[..., Sequence[Tensor]]
    step: Callable[..., Sequence[Tensor]]
    more: tuple[bool, ...]

    def make(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: str, *, bias: bool = True
    ) -> list[Tensor | None]:
        """input, states, w_ih, w_hh, b_ih, b_hh."""
        B, D, H = shape
        normal: Any = lambda *size: torch.randn(*size).to(device, dtype)  # noqa: E731
        rows = normal(B, D), *(normal(B, H) for _ in range(self.states))
        w_ih, w_hh, b_ih, b_hh, _ = weights(self.gates, D, H, dtype, device, bias=bias)
        if self.is_relu and dtype.itemsize == 2 and b_ih is not None:
            # As hidden_cases.make: each unit is clearly on or clearly off.
            w_ih, w_hh, b_ih = w_ih / 4, w_hh / 4, b_ih.sign() * 4 + b_ih  # type: ignore[operator]
        return [*rows, w_ih, w_hh, b_ih, b_hh]

    @property
    def is_relu(self) -> bool:
        return self.op == "rnn_cell" and self.more[0]


def pair(function: Callable[..., Any]) -> Callable[..., Any]:
    """An LSTM's cell on tensors that all stand by themselves."""
    return lambda x, h, c, *rest: function(x, (h, c), *rest)


def single(function: Callable[..., Tensor], **options: Any) -> Callable[..., Any]:
    return lambda *tensors: (function(*tensors, **options),)


CELLS = {
    "lstm": Cell(
        *("lstm_cell", 4, 2, pair(ops.lstm_cell), pair(torch.lstm_cell)),
        pair(reference.lstm_cell),
        lambda x, h, c, *rest: lstm_step(x, (h, c), rest[:4], *rest[4:]),
        (True,),
    ),
    "gru": Cell(
        *("gru_cell", 3, 1, single(ops.gru_cell), single(torch.gru_cell)),
        single(reference.gru_cell),
        lambda x, h, *rest: (gru_step(x, h, rest[:4], *rest[4:]),),
        (True,),
    ),
    "rnn-tanh": Cell(
        *("rnn_cell", 1, 1, single(ops.rnn_cell), single(torch.rnn_tanh_cell)),
        single(reference.rnn_cell),
        lambda x, h, *rest: (rnn_step(x, h, rest[:4], *rest[4:]),),
        (False,),
    ),
    "rnn-relu": Cell(
        *("rnn_cell", 1, 1, single(ops.rnn_cell, nonlinearity="relu")),
        *(single(torch.rnn_relu_cell), single(reference.rnn_cell, nonlinearity="relu")),
        lambda x, h, *rest: (rnn_step(x, h, rest[:4], *rest[4:], relu=True),),
        (True,),
    ),
}


@pytest.fixture(params=CELLS)
def cell(request: pytest.FixtureRequest) -> Cell:
    return CELLS[request.param]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_torch(
    backend: Any, cell: Cell, dtype: torch.dtype, shape: tuple[int, int, int], bias: bool
) -> None:
    make = lambda: cell.make(shape, dtype, backend.device, bias=bias)  # noqa: E731
    compare(cell.ours, cell.theirs, cell.exact, make)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 700, 600), (20, 1030, 700), (63, 640, 703)], ids=str)
def test_large_weights(cell: Cell, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """More than a million numbers, which backward on the CPU reads from top to bottom."""
    compare(cell.ours, cell.theirs, cell.exact, lambda: cell.make(shape, dtype, "cpu"))


def test_nan_goes_where_it_goes_in_torch(backend: Any, cell: Cell) -> None:
    tensors = cell.make((3, 5, 7), torch.float64, backend.device)
    with torch.no_grad():
        tensors[0][1, 0] = torch.nan  # type: ignore[index]
    for actual, expected in zip(run(cell.ours, tensors), run(cell.theirs, tensors), strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_inference_is_the_same(backend: Any, cell: Cell) -> None:
    tensors = cell.make((3, 5, 7), torch.float32, backend.device)
    with torch.no_grad():
        found = cell.ours(*tensors)
    for actual, expected in zip(found, run(cell.ours, tensors), strict=False):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 130, 140), (100, 33, 48), (17, 1030, 700)], ids=str)
def test_threads_change_no_bit(cell: Cell, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    tensors = cell.make(shape, dtype, "cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(cell.ours, tensors)
        torch.set_num_threads(3)
        together = run(cell.ours, tensors)
    finally:
        torch.set_num_threads(before)
    for actual, expected in zip(together, alone, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(backend: Any, cell: Cell, bias: bool) -> None:
    made = cell.make((2, 3, 4), torch.float64, backend.device, bias=bias)
    leaves = tuple(t.requires_grad_() for t in made if t is not None)
    assert torch.autograd.gradcheck(cell.ours, leaves)
    assert torch.autograd.gradgradcheck(cell.ours, leaves)


def raw_results(cell: Cell, call: Any, *args: Any) -> tuple[Tensor, ...]:
    found = call(*args)
    return (found,) if isinstance(found, Tensor) else found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend: Any, cell: Cell, dtype: torch.dtype) -> None:
    tensors = cell.make((2, 3, 4), dtype, backend.device)
    first = 1 + cell.states  # of the weights
    opcheck(backend.ops.cell_pack.default, (tensors[first], tensors[first + 1]))
    packed = backend.ops.cell_pack(tensors[first], tensors[first + 1])
    plain = getattr(backend.ops, cell.op)
    forward = getattr(backend.ops, f"{cell.op}_forward")
    for more in (False, True):
        opcheck(forward.default, (*tensors, None, more))
        opcheck(forward.default, (*tensors, packed, more))
    results = raw_results(cell, forward, *tensors, None, True)
    grads = [torch.ones_like(h) for h in results[: cell.states]]
    saved = results[-cell.states :]  # c and the gates, or the gates, or an RNN's h
    relu = (True,) if cell.op == "rnn_cell" else ()
    for needs in (63, 9) if cell.op != "rnn_cell" else (31, 5):
        opcheck(
            getattr(backend.ops, f"{cell.op}_backward").default,
            (*grads, *tensors[: first + 2], *saved, *relu, needs),
        )
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    opcheck(plain.default, (*leaves, *cell.more))


def test_compile_fullgraph(backend: Any, cell: Cell) -> None:
    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        h, *rest = cell.ours(2 * tensors[0], *tensors[1:])
        return 3 * h, *rest

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    tensors = cell.make((3, 5, 6), torch.float32, backend.device)
    for actual, expected in zip(run(compiled, tensors), run(step, tensors), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights(
    backend: Any, cell: Cell, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """Kept copies of the weights: the same accuracy, also with threads that they were not made
    for."""

    def kept(*tensors: Tensor) -> Sequence[Tensor]:
        packed = PackedWeights().of(*tensors[1 + cell.states :][:2])
        before = torch.get_num_threads()
        torch.set_num_threads(before + 2)
        try:
            return cell.step(*tensors, packed)
        finally:
            torch.set_num_threads(before)

    make = lambda: cell.make(shape, dtype, backend.device)  # noqa: E731
    compare(kept, cell.theirs, cell.exact, make)


@pytest.mark.parametrize("shape", [(1, 5, 7), (20, 33, 40), (130, 20, 24)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_of_one_step_is_the_same(
    backend: Any, cell: Cell, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """Its output and last state, all gradients, and from no state."""

    def sequence(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return one_step(cell, x, rest[: cell.states], rest[cell.states :])

    def twice(of: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
        return lambda *tensors: (of(*tensors)[0], *of(*tensors))

    make = lambda: cell.make(shape, dtype, backend.device)  # noqa: E731
    compare(sequence, twice(cell.theirs), twice(cell.exact), make)
    x, *rest = make()
    weights = rest[cell.states :]
    leaves = [t.requires_grad_() for t in (x, *weights)]

    def from_nothing(*tensors: Tensor) -> tuple[Tensor, ...]:
        return one_step(cell, tensors[0], (), tensors[1:])

    def from_zeros(*tensors: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros_like(t) for t in rest[: cell.states]]
        return one_step(cell, tensors[0], zeros, tensors[1:])

    for actual, expected in zip(run(from_nothing, leaves), run(from_zeros, leaves), strict=True):
        torch.testing.assert_close(actual, expected)


def one_step(
    cell: Cell, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Output and last states of a sequence of x alone."""
    if cell.op == "lstm_cell":
        output, last = ops.lstm(x[None], tuple(states) or None, *weights)
        return output[0], *last
    h0 = states[0] if states else None
    if cell.op == "gru_cell":
        output, h_n = ops.gru(x[None], h0, *weights)
    else:
        nonlinearity = "relu" if cell.is_relu else "tanh"
        output, h_n = ops.rnn(x[None], h0, *weights, nonlinearity=nonlinearity)
    return output[0], h_n


def test_bad_packed_weights(cell: Cell) -> None:
    tensors = cell.make((16, 5, 7), torch.float32, "cpu")
    w_ih, w_hh = tensors[1 + cell.states :][:2]
    call: Any = getattr(torch.ops.seqkern, f"{cell.op}_forward")
    pack: Any = torch.ops.seqkern.cell_pack
    packed = pack(w_ih, w_hh)
    others = cell.make((16, 6, 7), torch.float32, "cpu")[1 + cell.states :][:2]
    gates = 3 if cell.gates == 4 else 4  # others
    bad = {
        "packed must be the result of cell_pack, got float32": torch.zeros(999),
        "packed must be the result of cell_pack, got uint8": packed[:10],
        "packed must be the result of cell_pack, whole, got uint8": packed[:-1],
        "input width 6, H 7": pack(*others),
        "packed must be of weights float32": pack(w_ih.double(), w_hh.double()),
        f"got one of {gates} gates": pack(torch.ones(gates * 7, 5), torch.ones(gates * 7, 7)),
    }
    for text, blob in bad.items():
        with pytest.raises(RuntimeError, match=text):
            call(*tensors, blob, False)
    with pytest.raises(RuntimeError, match=r"w_hh must be \[gates H, H\], got float32"):
        pack(w_ih, w_hh[:, :6] if cell.gates > 1 else w_hh[:6])
    with pytest.raises(RuntimeError, match=r"w_ih must be float32 .*, got float32"):
        pack(w_ih[:-1], w_hh)


BAD_CALLS: dict[str, tuple[int, Callable[[Any], Any], str]] = {
    "input": (0, lambda x: x[0], r"input must be \[B, I\], got float32 \[5\]"),
    "h": (1, lambda h: h[:, :4], r"h must be float32 \[3, 7\], got float32 \[3, 4\]"),
    "w_hh": (-3, lambda w: w.double(), r"w_hh must be float32 \[\d+, 7\], got float64 \[\d+, 7\]"),
    "w_ih": (-4, lambda w: w[:, :3], r"w_ih must be float32 \[\d+, 5\], got float32 \[\d+, 3\]"),
    "b_hh": (-1, lambda b: b[:-1], r"b_hh must be float32 \[\d+\], got float32 \[\d+\]"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(backend: Any, cell: Cell, name: str) -> None:
    which, wrong, text = BAD_CALLS[name]
    tensors = cell.make((3, 5, 7), torch.float32, backend.device)
    tensors[which] = wrong(tensors[which])
    with pytest.raises(ValueError, match=rf"^{cell.op}: {text}"):
        cell.ours(*tensors)


def test_bad_nonlinearity() -> None:
    tensors = CELLS["rnn-tanh"].make((3, 5, 7), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"^rnn_cell: nonlinearity must .*, got 1$"):
        ops.rnn_cell(*tensors, nonlinearity=1)
