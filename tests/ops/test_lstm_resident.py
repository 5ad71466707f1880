"""The resident LSTM kernels of csrc/cuda on devices of several sizes: how units, batch rows and
weights are split there follows from the device, so the emulator pretends to be many."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from resident_cases import KB, T16, Device, assert_near, in_double, library, set_device
from test_lstm import exact, make, ours
from torch import Tensor

from recurrent import run, some_lengths
from seqkern import ops

__all__ = ["library"]


@dataclass(frozen=True)
class Case:
    """A layer on a device, and the launches that its forward and backward then are."""

    device: Device
    dtype: torch.dtype
    shape: tuple[int, int, int, int]  # T, B, input width D, H
    launches: int = 2


CASES = {
    "one-block": Case(Device(1), torch.float32, (3, 2, 2, 12)),
    "a-block-per-8-units": Case(Device(8), torch.float32, (4, 3, 2, 43)),
    "uneven-groups": Case(Device(3), torch.float32, (4, 5, 2, 27)),
    "uneven-groups-bf16": Case(Device(3), torch.bfloat16, (4, 5, 2, 27)),
    "batch-groups": Case(Device(7), torch.float32, (3, 21, 2, 16)),
    "batch-groups-bf16": Case(Device(7), torch.bfloat16, (3, 21, 2, 16)),
    "batch-groups-fp64": Case(Device(9), torch.float64, (3, 33, 2, 10)),
    "passes": Case(Device(1), torch.float32, (3, 70, 1, 9)),
    "passes-fp16": Case(Device(2), torch.float16, (3, 75, 1, 9)),
    "two-launches-each": Case(Device(1), torch.float64, (2, 70, 1, 58), launches=4),
    "weights-in-registers": Case(Device(18), torch.float64, (2, 1, 1, 140)),
    "weights-in-registers-and-shared-memory": Case(Device(3), torch.float32, (2, 2, 1, 150)),
    "weights-beyond-shared-memory": Case(Device(2, 125 * KB), torch.float32, (2, 2, 1, 150)),
    "weights-beyond-shared-memory-bf16": Case(Device(2, 96 * KB), torch.bfloat16, (2, 2, 1, 90)),
    "passes-limited-by-shared-memory": Case(
        Device(1, 83 * KB), torch.float32, (2, 67, 1, 5), launches=3
    ),
    # Of 32 rows, products take 8, 16 or all; of a warp's chunks, up to 4 at once.
    "tiles-1-chunks-2": Case(Device(9), torch.bfloat16, (2, 5, 1, 280)),
    "tiles-2-chunks-2": Case(Device(5), torch.bfloat16, (2, 13, 1, 280)),
    "tiles-3-chunks-2": Case(Device(5), torch.float16, (2, 21, 1, 280)),
    "tiles-4-and-2-chunks-2": Case(Device(5), torch.bfloat16, (2, 43, 1, 280)),
    "tiles-3-slots": Case(Device(2), torch.bfloat16, (2, 19, 1, 90)),
    "tiles-3-chunks-2-fp32": Case(Device(5), torch.float32, (2, 21, 1, 150)),
    "tiles-2-chunks-3-fp64": Case(Device(4), torch.float64, (2, 13, 1, 150)),
    # Blocks with two groups, so that two batch groups share the rows; the last one has one.
    "pairs-of-groups-1-tile": Case(Device(2), torch.bfloat16, (3, 13, 2, 16)),
    "pairs-of-groups-2-tiles": Case(Device(4), torch.float16, (3, 30, 2, 24)),
    "pairs-of-groups-2-passes": Case(Device(2), torch.bfloat16, (3, 43, 1, 16)),
    "pairs-of-groups-chunks-2": Case(Device(36), torch.bfloat16, (2, 13, 1, 280)),
    # Plans of one pass and one set, as many above, have kernels of their own: with all tiles, and
    # with launches of which the last leaves a batch group without rows.
    "one-cell-4-tiles": Case(Device(1), torch.bfloat16, (3, 29, 2, 7)),
    "one-cell-two-launches": Case(Device(2, 82 * KB), torch.bfloat16, (3, 67, 1, 5), launches=3),
    "per-step-old-device": Case(Device(4, major=7), torch.bfloat16, (3, 5, 2, 21), launches=0),
    "per-step": Case(Device(4, cooperative=False), torch.float32, (3, 10, 2, 37), launches=0),
    "per-step-bf16": Case(Device(4, cooperative=False), torch.bfloat16, (3, 5, 2, 37), launches=0),
    "per-step-small-shared-memory": Case(Device(4, 24 * KB), torch.float32, (2, 2, 2, 9), 0),
}


def assert_exact(
    found: list[Tensor], case: Case, reverse: bool, lengths: Tensor | None, x: Any
) -> None:
    assert_near(found, run(exact(reverse, lengths), in_double(x)), case.dtype)


@pytest.mark.parametrize("options", ["plain", "reverse-lengths"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_split(library: ctypes.CDLL, case: Case, options: str) -> None:
    set_device(library, case.device)
    T, B, _, _ = case.shape
    tensors = make(case.shape, case.dtype, "cpu")
    reverse = options != "plain"
    lengths = some_lengths(B, T, "cpu") if reverse else None
    if lengths is not None and B > 2:
        lengths[1] = 0
    before = library.seqkern_emu_launches()
    found = run(ours(reverse, lengths), tensors)
    if case.launches:
        assert library.seqkern_emu_launches() - before == case.launches
    else:  # forward; backward and its products
        assert library.seqkern_emu_launches() - before == 3 * T + 1
    assert_exact(found, case, reverse, lengths, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_order_of_threads(
    library: ctypes.CDLL, dtype: torch.dtype
) -> None:
    """Launch after launch, in workspaces that hold what earlier launches left there."""
    set_device(library, Device(6))
    tensors = make((4, 11, 2, 20), dtype, "cpu")
    results = []
    for seed in range(4):
        library.seqkern_emu_set_seed(seed)
        results.append(run(ours(), tensors))
    for again in results[1:]:
        for first, second in zip(results[0], again, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_batch(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """A row alone, and as one of many: in another pass, another batch group."""
    set_device(library, Device(3))
    input, h0, c0, *weights = make((3, 45, 2, 9), dtype, "cpu")
    assert input is not None
    assert h0 is not None
    assert c0 is not None
    gates_x = input.clone()
    output, (h, c) = ops.lstm(gates_x, (h0, c0), *weights)
    for row in (0, 8, 37, 44):
        one = slice(row, row + 1)
        # The input's product must not be the difference: the same batch, other rows emptied.
        lengths = torch.zeros(45, dtype=torch.int64)
        lengths[one] = 3
        alone, (h_alone, c_alone) = ops.lstm(gates_x, (h0, c0), *weights, lengths=lengths)
        assert torch.equal(output[:, one], alone[:, one])
        assert torch.equal(h[one], h_alone[one])
        assert torch.equal(c[one], c_alone[one])


@pytest.mark.parametrize(
    ("device", "B", "dtype", "H"),
    [
        (Device(9), 29, torch.float32, 9),
        (Device(9), 29, torch.float32, 140),
        (Device(9), 29, torch.bfloat16, 9),
        (Device(9), 29, torch.bfloat16, 270),
        (Device(2), 45, torch.bfloat16, 9),  # in two passes, or with the kernels for one
    ],
    ids=str,
)
def test_a_row_does_not_depend_on_the_size_of_the_batch(
    library: ctypes.CDLL, device: Device, B: int, dtype: torch.dtype, H: int
) -> None:
    """Products take other numbers of rows at once."""
    set_device(library, device)
    input, h0, c0, *weights = make((2, B, 1, H), dtype, "cpu")
    assert input is not None
    assert h0 is not None
    assert c0 is not None
    input.zero_()  # its product must not be the difference

    def outputs_and_gradients(n: int) -> list[Tensor]:
        h, c = h0[:n].requires_grad_(), c0[:n].requires_grad_()
        output, (h_n, c_n) = ops.lstm(input[:, :n].contiguous(), (h, c), *weights)
        grads = torch.autograd.grad(output.sum() + c_n.sum(), [h, c])
        return [output.transpose(0, 1), h_n, c_n, *grads]

    of_all = outputs_and_gradients(B)
    for n in (3, 9, 20):
        for few, many in zip(outputs_and_gradients(n), of_all, strict=True):
            assert torch.equal(few, many[:n])


def test_lengths_beyond_the_sequence_are_limited(library: ctypes.CDLL) -> None:
    tensors = make((3, 4, 2, 9), torch.float32, "cpu")
    wild = torch.tensor([-5, 2, 3, 1000])
    with torch.no_grad():
        found = ours(lengths=wild)(*tensors)
        limited = ours(lengths=wild.clamp(0, 3))(*tensors)
    for actual, expected in zip(found, limited, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "B", "H"),
    [
        (Device(30), 5, 600),
        (Device(30), 13, 600),
        (Device(30, 150 * KB), 13, 600),  # no room for pairs
        (Device(38), 5, 600),  # one pair
        (Device(38), 13, 600),
    ],
    ids=["3-chunks-1-tile", "3-chunks-2-tiles", "no-room", "one-1-tile", "one-2-tiles"],
)
def test_several_pairs_of_groups(library: ctypes.CDLL, device: Device, B: int, H: int) -> None:
    """Blocks that could have three groups have two pairs, which read half as much as four. Of a
    warp's chunks registers hold two of each group of the first pair."""
    case = Case(device, torch.bfloat16, (2, B, 1, H))
    set_device(library, case.device)
    tensors = make(case.shape, case.dtype, "cpu")
    assert_exact(run(ours(), tensors), case, False, None, tensors)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_chunks_per_warp(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Enough units that a warp's part of the inner dimension is more than its registers hold."""
    H = 1050 if dtype in T16 else 550  # 5 chunks a warp
    case = Case(Device(2, 160 * KB), dtype, (2, 1, 1, H))
    set_device(library, case.device)
    tensors = make(case.shape, dtype, "cpu")
    before = library.seqkern_emu_launches()
    found = run(ours(), tensors)
    assert library.seqkern_emu_launches() - before == case.launches
    assert_exact(found, case, False, None, tensors)
