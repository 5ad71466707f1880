"""ops.cross_entropy against PyTorch and the float64 reference, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import seqkern
from accuracy import assert_accurate
from ops.cross_entropy_cases import (
    DTYPES,
    OPTIONS,
    OURS_ONLY,
    SHAPES,
    cast_weight,
    class_weight,
    exact,
    make,
    resolve,
    run,
)
from seqkern import ops, reference

# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_torch(
    backend: Any, dtype: torch.dtype, shape: tuple[int, int], options: dict[str, Any]
) -> None:
    logits, target = make(*shape, dtype, backend.device)
    options = resolve(options, shape[1], backend.device)
    loss, grad = run(ops.cross_entropy, logits, target, **options)
    torch_loss, torch_grad = run(F.cross_entropy, logits, target, **cast_weight(options, dtype))
    exact_loss, exact_grad = exact(logits, target, **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    assert_accurate(loss, torch_loss, exact_loss, torch.promote_types(dtype, torch.float32))
    assert_accurate(grad, torch_grad, exact_grad, dtype)


@pytest.mark.parametrize("options", OURS_ONLY.values(), ids=OURS_ONLY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extensions_match_the_reference(
    backend: Any, dtype: torch.dtype, shape: tuple[int, int], options: dict[str, Any]
) -> None:
    logits, target = make(*shape, dtype, backend.device)
    options = resolve(options, shape[1], backend.device)
    loss, grad = run(ops.cross_entropy, logits, target, **options)
    acc = torch.promote_types(dtype, torch.float32)
    plain = lambda x, t, **o: reference.cross_entropy(x.to(acc), t, **o)[0]  # noqa: E731
    torch_loss, torch_grad = run(plain, logits, target, **options)
    exact_loss, exact_grad = exact(logits, target, **options)
    assert_accurate(loss, torch_loss, exact_loss, acc)
    assert_accurate(grad, torch_grad, exact_grad, dtype)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_class_probabilities(
    backend: Any, dtype: torch.dtype, weighted: bool, reduction: str, label_smoothing: float
) -> None:
    logits, _ = make(5, 37, dtype, backend.device)
    target = torch.randn(5, 37).softmax(-1).to(dtype).to(backend.device)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing}
    if weighted:
        options["weight"] = class_weight(37, backend.device)
    loss, grad = run(ops.cross_entropy, logits, target, **options)
    torch_loss, torch_grad = run(F.cross_entropy, logits, target, **cast_weight(options, dtype))
    exact_loss, exact_grad = exact(logits, target, **options)
    assert_accurate(loss, torch_loss, exact_loss, torch.promote_types(dtype, torch.float32))
    assert_accurate(grad, torch_grad, exact_grad, dtype)


def test_gradient_of_class_probabilities(backend: Any) -> None:
    logits, _ = make(3, 7, torch.float64, backend.device)
    target = torch.rand(3, 7, dtype=torch.float64, device=backend.device)
    target.requires_grad_()
    options = {"weight": class_weight(7, backend.device).double(), "label_smoothing": 0.2}
    (ours,) = torch.autograd.grad(ops.cross_entropy(logits, target, **options), target)
    (theirs,) = torch.autograd.grad(F.cross_entropy(logits, target, **options), target)
    torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------- shapes, strides, target dtypes


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 5, 4), (2, 5, 3, 4)], ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
def test_class_dimension_is_torchs(
    backend: Any, shape: tuple[int, ...], probabilities: bool
) -> None:
    logits = torch.randn(shape, device=backend.device)
    V = shape[0] if len(shape) == 1 else shape[1]
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    if probabilities:
        target = torch.rand(shape, device=backend.device)
    else:
        target = torch.randint(0, V, rows, device=backend.device)
    for_none = ops.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(for_none, F.cross_entropy(logits, target, reduction="none"))
    _, grad = run(ops.cross_entropy, logits, target)
    _, torch_grad = run(F.cross_entropy, logits, target)
    torch.testing.assert_close(grad, torch_grad)


VIEWS = {
    "shifted": lambda x: x[:, :-1].movedim(-1, 1),  # logits[:, :-1] of a language model
    "transposed-rows": lambda x: x.transpose(0, 1).movedim(-1, 1),
    "every-second-row": lambda x: x[:, ::2].movedim(-1, 1),
    "every-second-class": lambda x: x[:, :, ::2].movedim(-1, 1),
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1).movedim(-1, 1),
    "class-dim-1": lambda x: x.movedim(-1, 1).contiguous(),
    "offset": lambda x: x[1:, 1:, 1:].movedim(-1, 1),
    "reversed-batch": lambda x: x.flip(0).transpose(0, 1).movedim(-1, 1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strided_logits(backend: Any, view: Any) -> None:
    base = torch.randn(3, 4, 23, device=backend.device)
    logits = view(base)
    target = torch.randint(0, logits.shape[1], (logits.shape[0], *logits.shape[2:]))
    target = target.to(backend.device)
    x = base.clone().requires_grad_()
    ops.cross_entropy(view(x), target).backward()
    y = base.clone().requires_grad_()
    F.cross_entropy(view(y), target).backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ops.cross_entropy(logits, target), F.cross_entropy(logits, target))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64], ids=str)
def test_integer_targets(backend: Any, dtype: torch.dtype) -> None:
    logits, target = make(6, 40, torch.float32, backend.device, ignore=False)
    expected = F.cross_entropy(logits, target)
    torch.testing.assert_close(ops.cross_entropy(logits, target.to(dtype)), expected)


def test_uint8_ignore_index(backend: Any) -> None:
    logits, target = make(6, 40, torch.float32, backend.device, ignore=False)
    target[2] = 255
    expected = F.cross_entropy(logits, target, ignore_index=255)
    torch.testing.assert_close(
        ops.cross_entropy(logits, target.to(torch.uint8), ignore_index=255), expected
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probabilities_of_another_dtype(backend: Any, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 9, device=backend.device).to(dtype)
    target = torch.randn(3, 9, device=backend.device).softmax(-1).double()
    expected = F.cross_entropy(logits.double(), target)
    torch.testing.assert_close(ops.cross_entropy(logits, target), expected)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_rows(backend: Any, reduction: str) -> None:
    logits = torch.randn(0, 5, device=backend.device, requires_grad=True)
    target = torch.zeros(0, dtype=torch.int64, device=backend.device)
    loss = ops.cross_entropy(logits, target, reduction=reduction)
    expected = F.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, 5)


# ---------------------------------------------------------------- special values


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_ignored(backend: Any, reduction: str) -> None:
    logits = torch.randn(4, 6, device=backend.device, requires_grad=True)
    target = torch.full((4,), -100, device=backend.device)
    loss = ops.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(
        loss, F.cross_entropy(logits, target, reduction=reduction), equal_nan=True
    )
    loss.sum().backward()
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_masked_logits(backend: Any) -> None:
    logits = torch.randn(4, 530, device=backend.device)
    logits[:, 7:519] = -torch.inf
    target = torch.tensor([0, 3, 525, 6], device=backend.device)
    loss, grad = run(ops.cross_entropy, logits, target)
    torch_loss, torch_grad = run(F.cross_entropy, logits, target)
    torch.testing.assert_close(loss, torch_loss)
    torch.testing.assert_close(grad, torch_grad)
    assert (grad[:, 7:519] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 5, 599])
def test_nan_and_inf_reach_the_loss(backend: Any, value: float, column: int) -> None:
    logits = torch.randn(2, 600, device=backend.device)
    logits[1, column] = value
    target = torch.tensor([1, 2], device=backend.device)
    loss = ops.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(
        loss, F.cross_entropy(logits, target, reduction="none"), equal_nan=True
    )


def test_row_of_minus_infinity(backend: Any) -> None:
    logits = torch.full((1, 9), -torch.inf, device=backend.device)
    loss, lse = ops.cross_entropy(logits, torch.tensor([1], device=backend.device), return_lse=True)
    assert loss.isnan()
    assert lse.item() == -torch.inf


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_large_offsets(backend: Any, offset: float, label_smoothing: float) -> None:
    logits, target = make(4, 700, torch.float32, backend.device)
    logits = logits + offset
    loss, grad = run(ops.cross_entropy, logits, target, label_smoothing=label_smoothing)
    torch_loss, torch_grad = run(F.cross_entropy, logits, target, label_smoothing=label_smoothing)
    exact_loss, exact_grad = exact(logits, target, label_smoothing=label_smoothing)
    assert_accurate(loss, torch_loss, exact_loss, torch.float32)
    assert_accurate(grad, torch_grad, exact_grad, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_where_the_model_is_sure(backend: Any, dtype: torch.dtype) -> None:
    """p - 1 of the true class at p = 0.9999: the case where rounding p first loses everything."""
    logits = torch.zeros(1, 100, dtype=dtype, device=backend.device)
    logits[0, 7] = 14.0
    target = torch.tensor([7], device=backend.device)
    _, grad = run(ops.cross_entropy, logits, target)
    _, exact_grad = exact(logits, target)
    rtol, atol = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps / 2
    torch.testing.assert_close(grad.double(), exact_grad, rtol=rtol, atol=atol)


# ---------------------------------------------------------------- log-sum-exp


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_lse_and_its_gradient(backend: Any, reduction: str, softcap: float) -> None:
    logits, target = make(6, 70, torch.float64, backend.device)
    x = logits.clone().requires_grad_()
    loss, lse = ops.cross_entropy(x, target, reduction=reduction, softcap=softcap, return_lse=True)
    coefficients = torch.randn(6, dtype=torch.float64).to(backend.device)
    (loss.sum() + (coefficients * lse).sum()).backward()
    y = logits.clone().requires_grad_()
    expected, expected_lse = reference.cross_entropy(
        y, target, reduction=reduction, softcap=softcap
    )
    (expected.sum() + (coefficients * expected_lse).sum()).backward()
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(x.grad, y.grad)


def test_lse_alone(backend: Any) -> None:
    x = torch.randn(3, 11, dtype=torch.float64, device=backend.device, requires_grad=True)
    target = torch.tensor([1, -100, 2], device=backend.device)
    _, lse = ops.cross_entropy(x, target, return_lse=True)
    (grad,) = torch.autograd.grad(lse.sum(), x)
    torch.testing.assert_close(grad, x.softmax(-1))


# ---------------------------------------------------------------- determinism


@pytest.mark.parametrize("shape", [(300, 517), (40001, 5), (20003, 16)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_bits_do_not_depend_on_threads(shape: tuple[int, int], softcap: float) -> None:
    logits, target = make(*shape, torch.float32, "cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(ops.cross_entropy, logits, target, reduction="none", softcap=softcap)
        torch.set_num_threads(3)
        three = run(ops.cross_entropy, logits, target, reduction="none", softcap=softcap)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], three[0])
    assert torch.equal(one[1], three[1])


# ---------------------------------------------------------------- module


def test_module_is_torchs(backend: Any) -> None:
    weight = class_weight(9, backend.device)
    ours = seqkern.nn.CrossEntropyLoss(weight, ignore_index=3, reduction="sum", label_smoothing=0.1)
    theirs = torch.nn.CrossEntropyLoss(weight, ignore_index=3, reduction="sum", label_smoothing=0.1)
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    logits, target = make(6, 9, torch.float32, backend.device, ignore=False)
    torch.testing.assert_close(ours(logits, target), theirs(logits, target))


def test_module_options(backend: Any) -> None:
    module = seqkern.nn.CrossEntropyLoss(z_loss=0.1, softcap=2.0)
    logits, target = make(6, 9, torch.float32, backend.device)
    expected = ops.cross_entropy(logits, target, z_loss=0.1, softcap=2.0)
    assert torch.equal(module(logits, target), expected)
    assert repr(module) == "CrossEntropyLoss(z_loss=0.1, softcap=2.0)"
