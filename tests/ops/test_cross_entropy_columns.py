"""ops.cross_entropy of rows that lie side by side, [B, V, T]: the CPU reads them where they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from accuracy import assert_accurate
from ops.cross_entropy_cases import (
    DTYPES,
    OPTIONS,
    OURS_ONLY,
    cast_weight,
    resolve,
    run,
)
from seqkern import ops, reference

# Around a vector of any width, four of them, 64 classes, and those that warps share (4 and 16).
SHAPES = [
    (2, 5, 16),
    (3, 65, 50),
    (1, 130, 7, 13),
    (2, 64, 17),
    (1, 3, 129),
    (70, 23),
    (1, 300, 40),
]


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Logits [B, V, ...] of contiguous rows of T, or transposed [N, V]; targets, some ignored."""
    logits = (3 * torch.randn(shape)).to(device=device, dtype=dtype)
    if logits.dim() == 2:
        logits = logits.t().contiguous().t()
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    target.view(-1)[::3] = -100
    target.view(-1)[-1] = shape[1] - 1
    return logits, target.to(device)


def check(logits: Tensor, target: Tensor, theirs: Any, **options: Any) -> None:
    dtype, acc = logits.dtype, torch.promote_types(logits.dtype, torch.float32)
    loss, grad = run(ops.cross_entropy, logits, target, **options)
    torch_loss, torch_grad = run(theirs, logits, target, **options)
    exact_target = target.double() if target.is_floating_point() else target
    exact_loss, exact_grad = run(plain, logits.double(), exact_target, **options)
    assert_accurate(loss, torch_loss, exact_loss, acc)
    assert_accurate(grad, torch_grad, exact_grad, dtype)


def torchs(x: Tensor, target: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(x, target, **cast_weight(options, x.dtype))


def in_rows(x: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The reference, whose class dimension is the last one."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(1, -1)
    target = target.movedim(1, -1).to(x.dtype) if target.is_floating_point() else target
    return reference.cross_entropy(x, target, **options)


def plain(x: Tensor, target: Tensor, **options: Any) -> Tensor:
    return in_rows(x, target, **options)[0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_torch(
    backend: Any, dtype: torch.dtype, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    logits, target = make(shape, dtype, backend.device)
    check(logits, target, torchs, **resolve(options, shape[1], backend.device))


@pytest.mark.parametrize("options", OURS_ONLY.values(), ids=OURS_ONLY)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extensions_match_the_reference(
    backend: Any, dtype: torch.dtype, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    logits, target = make(shape, dtype, backend.device)
    check(logits, target, plain, **resolve(options, shape[1], backend.device))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("options", ["plain", "smoothing-weight"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_class_probabilities(
    backend: Any, dtype: torch.dtype, shape: tuple[int, ...], options: str, reduction: str
) -> None:
    logits, _ = make(shape, dtype, backend.device)
    target = torch.empty_like(logits).copy_(torch.randn(shape).softmax(1))
    kept = {**resolve(OPTIONS[options], shape[1], backend.device), "reduction": reduction}
    check(logits, target, torchs, **kept)
    check(logits, target.movedim(1, -1).contiguous().movedim(-1, 1), torchs, **kept)


VIEWS = {
    "every-second-class": lambda x: x[:, ::2],
    "part-of-the-rows": lambda x: x[:, :, 5:38],
    "part-of-the-batches": lambda x: x[1::2, 1:],
    "batches-inside": lambda x: x.permute(2, 1, 0),
    "expanded-batch": lambda x: x[:1].expand(3, -1, -1),
    "expanded-rows": lambda x: x[:, :, :1].expand(-1, -1, 20),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strided(backend: Any, view: Any) -> None:
    base = torch.randn(4, 9, 40, device=backend.device, dtype=torch.float64)
    rows = view(base).shape
    target = torch.randint(0, rows[1], (rows[0], *rows[2:]), device=backend.device)
    grads = []
    for function in (ops.cross_entropy, F.cross_entropy):
        x = base.clone().requires_grad_()
        loss = function(view(x), target)
        grads += [loss.detach(), *torch.autograd.grad(loss, x)]
    torch.testing.assert_close(grads[:2], grads[2:])


@pytest.mark.parametrize("shape", [(3, 65, 50), (2, 5, 4, 7)], ids=str)
def test_the_gradient_is_laid_out_as_the_logits(shape: tuple[int, ...]) -> None:
    """So that what made them, a convolution perhaps, need not copy it."""
    logits, target = make(shape, torch.float32, "cpu")
    (grad,) = torch.autograd.grad(ops.cross_entropy(logits.requires_grad_(), target), logits)
    assert grad.stride() == logits.stride()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_special_values(backend: Any, value: float) -> None:
    """They reach the rows they are in; a row of -inf alone has none but NaN."""
    logits, target = make((2, 70, 33), torch.float32, backend.device)
    for at in ((0, 0, 1), (0, 69, 2), (1, 66, 3), (1, slice(None), 32)):
        logits[at] = value
    target[target == -100] = 1
    loss, grad = run(ops.cross_entropy, logits, target, reduction="none")
    torch_loss, torch_grad = run(F.cross_entropy, logits, target, reduction="none")
    torch.testing.assert_close(loss, torch_loss, equal_nan=True)
    whole = torch_grad.isfinite().all(1, keepdim=True).expand_as(grad)
    torch.testing.assert_close(grad[whole], torch_grad[whole])
    assert grad.isnan().any(1).equal(torch_grad.isnan().any(1))


def test_masked_logits(backend: Any) -> None:
    logits, target = make((2, 200, 40), torch.float32, backend.device)
    logits[:, :150] = -torch.inf  # whole blocks of classes
    target[target != -100] = 150
    for actual, expected in zip(
        run(ops.cross_entropy, logits, target), run(F.cross_entropy, logits, target), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 2.0}], ids=str)
def test_ignored_rows_may_hold_anything(backend: Any, options: dict[str, Any]) -> None:
    logits, target = make((2, 20, 40), torch.float32, backend.device)
    expected = run(ops.cross_entropy, logits, target, **options)
    logits.movedim(1, -1)[target == -100] = torch.nan
    loss, grad = run(ops.cross_entropy, logits, target, **options)
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_lse_and_its_gradient(backend: Any, softcap: float) -> None:
    logits, target = make((2, 70, 21), torch.float64, backend.device)
    coefficients = torch.randn(2, 21, dtype=torch.float64).to(backend.device)
    results = []
    for loss_of in (partial(ops.cross_entropy, return_lse=True), in_rows):
        x = logits.clone().requires_grad_()
        loss, lse = loss_of(x, target, softcap=softcap)
        (loss + (coefficients * lse).sum()).backward()
        results.append([loss.detach(), lse.detach(), x.grad])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("shape", [(2, 30, 5001), (300, 517)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("probabilities", [False, True])
def test_bits_do_not_depend_on_threads(
    shape: tuple[int, ...], softcap: float, smoothing: float, weighted: bool, probabilities: bool
) -> None:
    """Nor on which vectors of rows a thread's share is cut into: with g++ 15 they once did."""
    logits, target = make(shape, torch.float32, "cpu")
    if probabilities:
        target = torch.randn_like(logits).softmax(1)
    options: dict[str, Any] = {"softcap": softcap, "label_smoothing": smoothing}
    if weighted:
        options["weight"] = torch.rand(shape[1])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(ops.cross_entropy, logits, target, **options))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 16), (20, 7), (2, 5, 15), (2, 3, 4, 5)], ids=str)
def test_opcheck(backend: Any, shape: tuple[int, ...], probabilities: bool) -> None:
    logits, target = make(shape, torch.float32, backend.device)
    if probabilities:
        target = torch.empty_like(logits).copy_(torch.randn(shape).softmax(1))
        target = target.movedim(1, -1)
    logits = logits.movedim(1, -1)
    raw = backend.ops
    options = (None, -100, 1, 0.1, 0.0, 0.0)
    opcheck(raw.cross_entropy_forward.default, (logits, target, *options, True))
    loss, lse, saved = raw.cross_entropy_forward(logits, target, *options, True)
    arguments = (loss, lse, logits, target, None, saved)
    opcheck(raw.cross_entropy_backward.default, (*arguments, *options[1:]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend: Any, dynamic: bool) -> None:
    compiled = torch.compile(ops.cross_entropy, fullgraph=True, dynamic=dynamic)
    for T in (20, 33):
        logits, target = make((2, 9, T), torch.float32, backend.device)
        for actual, expected in zip(
            run(compiled, logits, target), run(F.cross_entropy, logits, target), strict=True
        ):
            torch.testing.assert_close(actual, expected)
