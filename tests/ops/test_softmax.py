"""ops.softmax and ops.log_softmax against PyTorch's and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from accuracy import assert_accurate
from seqkern import ops

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OURS: dict[bool, Any] = {False: ops.softmax, True: ops.log_softmax}
THEIRS: dict[bool, Any] = {False: torch.softmax, True: torch.log_softmax}
# Below, at and beyond a vector, a block of the CPU's and a warp's row on CUDA.
ROWS = [1, 3, 16, 33, 129]
LONG = [511, 512, 513, 1500, 5000]


def outcome(function: Any, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    return [y, dx]


def check(log: bool, x: Tensor, dy: Tensor) -> None:
    ours = outcome(OURS[log], x, dy)
    theirs = outcome(lambda x: THEIRS[log](x, -1), x, dy)
    exact = outcome(lambda x: THEIRS[log](x, -1), x.double(), dy.double())
    for actual, torchs, truth in zip(ours, theirs, exact, strict=True):
        assert actual.dtype == x.dtype
        assert actual.is_contiguous()
        assert_accurate(actual, torchs, truth, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("V", ROWS + LONG)
def test_matches_torch(backend: Any, V: int, log: bool, dtype: torch.dtype) -> None:
    N = 2 if backend.tiny and V > 129 else 7
    x = (3 * torch.randn(N, V)).to(backend.device, dtype)
    check(log, x, torch.randn(N, V).to(backend.device, dtype))


@pytest.mark.parametrize("log", [False, True])
def test_far_from_zero(backend: Any, log: bool) -> None:
    x = 3 * torch.randn(3, 40, device=backend.device) + torch.tensor([[1e4], [-1e4], [0.0]]).to(
        backend.device
    )
    check(log, x, torch.randn(3, 40, device=backend.device))


VIEWS: dict[str, Any] = {
    "contiguous": lambda x: x,
    "sliced": lambda x: x[1:, ::2, 1:8, :5],
    "transposed": lambda x: x.transpose(1, 3),
    "row": lambda x: x[0, 0, 0],
    "permuted": lambda x: x.permute(2, 0, 3, 1),
}


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides_and_shapes(backend: Any, view: Any, log: bool) -> None:
    x = view(torch.randn(3, 4, 10, 6, device=backend.device))
    check(log, x, torch.randn_like(x))
    check(log, x, torch.randn(*x.shape, 2, device=backend.device)[..., 0])


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 4)])
def test_empty(backend: Any, shape: tuple[int, ...], log: bool) -> None:
    x = torch.randn(shape, device=backend.device, requires_grad=True)
    y = OURS[log](x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("V", [5, 700])
def test_special_values(backend: Any, V: int, log: bool, dtype: torch.dtype) -> None:
    inf, nan = torch.inf, torch.nan
    rows = torch.zeros(6, V)
    rows[0, 1:] = -inf
    rows[1] = -inf
    rows[2, V // 2] = inf
    rows[3, -1] = nan
    rows[4, :2] = torch.tensor([nan, inf])
    rows[5] = torch.finfo(torch.float16).min
    x = rows.to(backend.device, dtype)
    expected = THEIRS[log](x, -1)
    torch.testing.assert_close(OURS[log](x), expected, equal_nan=True)


@pytest.mark.parametrize("log", [False, True])
def test_derivatives(backend: Any, log: bool) -> None:
    x = torch.randn(2, 5, dtype=torch.float64, device=backend.device, requires_grad=True)
    assert torch.autograd.gradcheck(OURS[log], (x,))
    assert torch.autograd.gradgradcheck(OURS[log], (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log", [False, True])
def test_opcheck(backend: Any, log: bool, dtype: torch.dtype) -> None:
    raw: Any = backend.ops
    x = torch.randn(3, 6, device=backend.device).to(dtype)
    opcheck(raw.softmax_forward.default, (x, log))
    opcheck(raw.softmax_backward.default, (x, raw.softmax_forward(x, log), log))
    opcheck(raw.softmax.default, (x.requires_grad_(), log))


def test_same_bits_for_any_number_of_threads() -> None:
    x = torch.randn(300, 700)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(outcome(ops.softmax, x, x))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_result_changed_before_backward(backend: Any) -> None:
    x = torch.randn(2, 3, device=backend.device, requires_grad=True)
    y = ops.softmax(x)
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor(1.0), r"^softmax: x must be \[\.\.\., V\], got a scalar$"),
        (torch.arange(3), r"^softmax: x must be .*, got int64 \[3\]$"),
    ],
)
def test_errors(backend: Any, x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.softmax(x.to(backend.device))
