"""What only the emulator can show of the CUDA kernels: independence of the order of threads."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

NONE, MEAN = 0, 1


@pytest.fixture(scope="module")
def emulator(emulator_library: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(emulator_library))
    library.seqkern_emu_set_seed.argtypes = [ctypes.c_uint64]
    library.seqkern_emu_set_seed.restype = None
    library.seqkern_emu_launches.restype = ctypes.c_uint64
    return library


def run(
    logits: torch.Tensor, target: torch.Tensor, reduction: int, **changes: Any
) -> list[torch.Tensor]:
    """Everything the forward and the backward return."""
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 0.0, **changes}
    weight = torch.linspace(0.5, 1.5, logits.shape[-1])
    ops = torch.ops.seqkern_emu
    out = ops.cross_entropy_forward(
        logits, target, weight, -100, reduction, *options.values(), True
    )
    grad = torch.ones_like(out[0])
    dlogits = ops.cross_entropy_backward(
        grad, out[1], logits, target, weight, out[2], -100, reduction, *options.values()
    )
    return [*out, dlogits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [50, 4100])  # a warp per row, a block per row
def test_same_bits_in_every_order(emulator: ctypes.CDLL, V: int, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(5, V)).to(dtype)
    target = torch.randint(0, V, (5,))
    results = []
    for seed in range(3):
        emulator.seqkern_emu_set_seed(seed)
        results.append(run(logits, target, MEAN))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("V", [64, 1040, 9000])  # a warp per row, blocks of 128 and of 256 threads
def test_a_row_does_not_depend_on_the_other_rows(emulator: ctypes.CDLL, V: int) -> None:
    logits = 3 * torch.randn(9, V)
    target = torch.randint(0, V, (9,))
    loss, lse, _, dlogits = run(logits, target, NONE)
    alone = run(logits[7:8].clone(), target[7:8], NONE)
    assert torch.equal(alone[0], loss[7:8])
    assert torch.equal(alone[1], lse[7:8])
    assert torch.equal(alone[3], dlogits[7:8])


@pytest.mark.parametrize("V", [9, 2000])
@pytest.mark.parametrize("wrong", [-1, -101, 2000, 2**40])
def test_target_out_of_range_is_nan(emulator: ctypes.CDLL, wrong: int, V: int) -> None:
    logits = torch.randn(4, V)
    target = torch.tensor([1, wrong, -100, 3])
    loss, lse, _, dlogits = run(logits, target, NONE)
    assert loss.isnan().tolist() == [False, True, False, False]
    assert dlogits.isnan().all(1).tolist() == [False, True, False, False]
    torch.testing.assert_close(lse, logits.logsumexp(1))
    assert run(logits, target, MEAN)[0].isnan()


INF = float("inf")
SPECIAL_ROWS = {
    "inf": [1.0, 2.0, INF],
    "one -inf": [1.0, -INF, 3.0],
    "all -inf": [-INF, -INF, -INF],
    "nan": [float("nan"), 1.0, 2.0],
    "all lowest": [torch.finfo(torch.float32).min] * 3,
    "far apart": [3e38, -3e38, 0.0],
    "all but one masked": [-INF, -INF, 0.0],
}


@pytest.mark.parametrize("row", SPECIAL_ROWS.values(), ids=SPECIAL_ROWS)
@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_special_values_as_on_the_cpu(
    emulator: ctypes.CDLL, row: list[float], target: int, label_smoothing: float
) -> None:
    logits = torch.tensor([row])
    targets = torch.tensor([target])
    results = []
    for ops in (torch.ops.seqkern, torch.ops.seqkern_emu):
        options = (-100, NONE, label_smoothing, 0.0, 0.0)
        loss, lse, saved = ops.cross_entropy_forward(logits, targets, None, *options, True)
        grad = ops.cross_entropy_backward(
            torch.ones_like(loss), None, logits, targets, None, saved, *options
        )
        results.append((loss, lse, grad))
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, equal_nan=True)


def test_kernels_run(emulator: ctypes.CDLL) -> None:
    before = emulator.seqkern_emu_launches()
    run(torch.randn(2, 3), torch.tensor([0, 1]), MEAN)
    assert emulator.seqkern_emu_launches() == before + 3
