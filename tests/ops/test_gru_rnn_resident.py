"""The resident GRU and RNN kernels of csrc/cuda on devices of several sizes, as
test_lstm_resident.py: what of it is theirs, the cell and the weights of fewer gates."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hidden_cases import CELLS, exact, make, ours
from resident_cases import KB, Device, assert_near, in_double, library, set_device

from recurrent import run, some_lengths

__all__ = ["library"]

# Device, dtype, (T, B, D, H), launches of forward and backward
CASES = {
    "one-block": (Device(1), torch.float32, (3, 2, 2, 12), 2),
    "uneven-groups": (Device(3), torch.float32, (4, 5, 2, 27), 2),
    "uneven-groups-bf16": (Device(3), torch.bfloat16, (4, 5, 2, 27), 2),
    "batch-groups-fp16": (Device(7), torch.float16, (3, 21, 2, 16), 2),
    "passes": (Device(1), torch.float32, (3, 37, 1, 9), 2),
    "two-launches-each": (Device(1), torch.float64, (2, 70, 1, 58), 4),
    "weights-beyond-shared-memory": (Device(2, 96 * KB), torch.bfloat16, (2, 2, 1, 90), 2),
    "per-step": (Device(4, cooperative=False), torch.float32, (3, 10, 2, 21), 0),
    "per-step-bf16": (Device(4, cooperative=False), torch.bfloat16, (3, 5, 2, 21), 0),
    "per-step-small-shared-memory": (Device(4, 24 * KB), torch.float64, (2, 2, 2, 9), 0),
}


@pytest.mark.parametrize("options", ["plain", "reverse-lengths"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", CASES)
def test_every_split(library: ctypes.CDLL, name: str, cell: str, options: str) -> None:
    device, dtype, shape, launches = CASES[name]
    set_device(library, device)
    T, B, _, _ = shape
    tensors = make(cell, shape, dtype, "cpu")
    reverse = options != "plain"
    lengths = some_lengths(B, T, "cpu") if reverse else None
    if lengths is not None and B > 2:
        lengths[1] = 0
    before = library.seqkern_emu_launches()
    found = run(ours(cell, reverse=reverse, lengths=lengths), tensors)
    # Per step: forward; backward, its product, and the end.
    assert library.seqkern_emu_launches() - before == (launches or 3 * T + 1)
    assert_near(found, run(exact(cell, reverse, lengths), in_double(tensors)), dtype)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_order_of_threads(
    library: ctypes.CDLL, dtype: torch.dtype, cell: str
) -> None:
    """Launch after launch, in workspaces that hold what earlier launches left there."""
    set_device(library, Device(6))
    tensors = make(cell, (4, 11, 2, 20), dtype, "cpu")
    results = []
    for seed in range(3):
        library.seqkern_emu_set_seed(seed)
        results.append(run(ours(cell), tensors))
    for again in results[1:]:
        for first, second in zip(results[0], again, strict=True):
            assert torch.equal(first, second)
