"""What tests/ops does not reach in the CUDA kernels of a decoding step: every width, the kernels of
older GPUs, and independence of the order of threads."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ops.test_attention_step import compare, make
from ops.test_linear_step import FULL
from ops.test_linear_step import compare as compare_linear
from ops.test_linear_step import make as make_linear
from seqkern import ops

HALF = [torch.float16, torch.bfloat16]
LINEAR = [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize("D", [1, 8, 15, 16, 24, 31, 33, 64, 72, 100, 127, 128, 129, 200, 256])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_widths(dtype: torch.dtype, D: int) -> None:
    compare(make("cpu", B=1, NH=6, NKV=2, S=2, D=D, L=150, positions=[139]), dtype)


@pytest.mark.parametrize("rows", [2, 3, 4, 8, 9, 17])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_query_rows(dtype: torch.dtype, rows: int) -> None:
    compare(make("cpu", B=1, NH=rows, NKV=1, D=40, L=140, positions=[130]), dtype)


@pytest.mark.usefixtures("older_gpu")
@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_older_gpus(dtype: torch.dtype, rows: int) -> None:
    step = make("cpu", B=2, NH=rows, NKV=1, D=72, L=300, positions=[290, 20])
    compare(step, dtype)
    compare(step, dtype, window=100, softcap=3.0)


@pytest.mark.usefixtures("older_gpu")
@pytest.mark.parametrize("dtypes", LINEAR, ids=str)
def test_linear_step_of_older_gpus(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    backend = SimpleNamespace(device="cpu")
    for N in (1, 3, 5):
        compare_linear(backend, make_linear(N, 70, 9, **FULL), *dtypes)


def test_launches_of_a_linear_step(library: ctypes.CDLL) -> None:
    """Many rows that are not multiplied as they are get prepared, on tensor cores."""

    def launches(N: int, dtype: torch.dtype, **options: Any) -> int:
        x, weight = torch.randn(N, 40).to(dtype), torch.randn(9, 40).bfloat16()
        before = library.seqkern_emu_launches()
        ops.linear_step(x, weight, **options)
        return int(library.seqkern_emu_launches() - before)

    assert launches(4, torch.float32) == launches(40, torch.bfloat16) == 1
    assert launches(5, torch.float32) == launches(5, torch.bfloat16, norm="rms_norm") == 2
    library.seqkern_emu_set_compute_capability(7)
    try:
        assert launches(5, torch.float32) == 1
    finally:
        library.seqkern_emu_set_compute_capability(8)


@pytest.mark.parametrize(("NH", "dtype"), [(2, torch.float32), (12, torch.bfloat16)], ids=str)
def test_any_order_of_threads(library: ctypes.CDLL, NH: int, dtype: torch.dtype) -> None:
    """The same bits, whichever block ends last."""
    step = make("cpu", NH=NH, NKV=2, S=2, D=32, L=400, positions=[390, 130])
    outs = []
    try:
        for seed in (1, 2, 3):
            library.seqkern_emu_set_seed(seed)
            outs.append(ops.attention_step(*step.to(dtype).tensors))
    finally:
        library.seqkern_emu_set_seed(0)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
