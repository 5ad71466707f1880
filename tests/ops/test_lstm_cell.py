"""ops.lstm_cell against PyTorch and the float64 reference, on every backend that has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from recurrent import DTYPES, compare, run, weights
from seqkern import ops, reference
from seqkern.ops.lstm_cell import PackedWeights, step

#: B, input width D, H: rows read weights in place, or packed on the way.
SHAPES = [
    *((1, 1, 1), (3, 5, 7), (17, 3, 40), (1, 40, 96), (2, 9, 257)),
    *((6, 70, 20), (64, 33, 18), (65, 3, 5)),
    *((17, 32, 64), (31, 16, 48), (32, 48, 16)),  # whole vectors, whatever the instruction set
    *((40, 130, 140), (97, 20, 24), (530, 5, 6)),  # columns in pieces; rows in pieces
    *((20, 40, 8), (20, 8, 40)),  # one weight deep enough for a matrix unit, the other not
]


def make(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, *, bias: bool = True
) -> list[Tensor | None]:
    """input, h, c, w_ih, w_hh, b_ih, b_hh."""
    B, D, H = shape
    normal: Any = lambda *size: torch.randn(*size).to(device, dtype)  # noqa: E731
    return [
        *(normal(B, D), normal(B, H), normal(B, H)),
        *weights(4, D, H, dtype, device, bias=bias)[:4],
    ]


def ours(input: Tensor, h: Tensor, c: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return ops.lstm_cell(input, (h, c), *rest)


def exact(input: Tensor, h: Tensor, c: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return reference.lstm_cell(input, (h, c), *rest)


def theirs(input: Tensor, h: Tensor, c: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return torch.lstm_cell(input, (h, c), *rest)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_torch(
    backend: Any, dtype: torch.dtype, shape: tuple[int, int, int], bias: bool
) -> None:
    compare(ours, theirs, exact, lambda: make(shape, dtype, backend.device, bias=bias))


def test_inference_is_the_same(backend: Any) -> None:
    tensors = make((3, 5, 7), torch.float32, backend.device)
    with torch.no_grad():
        found = ours(*tensors)
    for actual, expected in zip(found, run(ours, tensors), strict=False):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 130, 140), (100, 33, 48)], ids=str)
def test_threads_change_no_bit(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    tensors = make(shape, dtype, "cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(ours, tensors)
        torch.set_num_threads(3)
        together = run(ours, tensors)
    finally:
        torch.set_num_threads(before)
    for actual, expected in zip(together, alone, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(backend: Any, bias: bool) -> None:
    tensors = [
        t for t in make((2, 3, 4), torch.float64, backend.device, bias=bias) if t is not None
    ]
    leaves = tuple(t.requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(ours, leaves)
    assert torch.autograd.gradgradcheck(ours, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend: Any, dtype: torch.dtype) -> None:
    raw: Any = backend.ops
    tensors = make((2, 3, 4), dtype, backend.device)
    opcheck(raw.lstm_cell_pack.default, (tensors[3], tensors[4]))
    packed = raw.lstm_cell_pack(tensors[3], tensors[4])
    for save in (False, True):
        opcheck(raw.lstm_cell_forward.default, (*tensors, None, save))
        opcheck(raw.lstm_cell_forward.default, (*tensors, packed, save))
    h, c, gates = raw.lstm_cell_forward(*tensors, None, True)
    grads = torch.ones_like(h), torch.ones_like(c)
    for needs in (63, 9):
        opcheck(raw.lstm_cell_backward.default, (*grads, *tensors[:5], c, gates, needs))
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    opcheck(raw.lstm_cell.default, (*leaves, True))


def test_compile_fullgraph(backend: Any) -> None:
    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        h, c = ours(2 * tensors[0], *tensors[1:])
        return 3 * h, c

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    tensors = make((3, 5, 6), torch.float32, backend.device)
    for actual, expected in zip(run(compiled, tensors), run(step, tensors), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights(backend: Any, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Kept copies of the weights: the same accuracy, also with threads that they were not made
    for."""

    def kept(*tensors: Tensor) -> tuple[Tensor, ...]:
        packed = PackedWeights().of(tensors[3], tensors[4])
        before = torch.get_num_threads()
        torch.set_num_threads(before + 2)
        try:
            return step(tensors[0], (tensors[1], tensors[2]), tensors[3:], packed)
        finally:
            torch.set_num_threads(before)

    compare(kept, theirs, exact, lambda: make(shape, dtype, backend.device))


def test_bad_packed_weights() -> None:
    tensors = make((16, 5, 7), torch.float32, "cpu")
    call: Any = torch.ops.seqkern.lstm_cell_forward
    packed = torch.ops.seqkern.lstm_cell_pack(tensors[3], tensors[4])
    others = make((16, 6, 7), torch.float32, "cpu")
    bad = {
        "packed must be the result of lstm_cell_pack, got float32": torch.zeros(999),
        "packed must be the result of lstm_cell_pack, got uint8": packed[:10],
        "packed must be the result of lstm_cell_pack, whole, got uint8": packed[:-1],
        "input width 6, H 7": torch.ops.seqkern.lstm_cell_pack(others[3], others[4]),
        "packed must be of weights float32": torch.ops.seqkern.lstm_cell_pack(
            tensors[3].double(), tensors[4].double()
        ),
    }
    for text, blob in bad.items():
        with pytest.raises(RuntimeError, match=text):
            call(*tensors, blob, False)
    with pytest.raises(
        RuntimeError, match=r"w_hh must be float32 \[28, 7\], got float32 \[28, 6\]"
    ):
        torch.ops.seqkern.lstm_cell_pack(tensors[3], tensors[4][:, :6])


BAD_CALLS: dict[str, tuple[Any, str]] = {
    "input": (
        lambda t: ops.lstm_cell(t[0][0], (t[1], t[2]), *t[3:]),
        r"lstm_cell: input must be \[B, I\], got float32 \[5\]",
    ),
    "h": (
        lambda t: ops.lstm_cell(t[0], (t[1][:, :4], t[2]), *t[3:]),
        r"lstm_cell: h must be float32 \[3, 7\], got float32 \[3, 4\]",
    ),
    "w_hh": (
        lambda t: ops.lstm_cell(t[0], (t[1], t[2]), t[3], t[4].double(), *t[5:]),
        r"lstm_cell: w_hh must be float32 \[28, 7\], got float64 \[28, 7\]",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(backend: Any, name: str) -> None:
    call, text = BAD_CALLS[name]
    with pytest.raises(ValueError, match=text):
        call(make((3, 5, 7), torch.float32, backend.device))
