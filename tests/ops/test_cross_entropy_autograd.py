"""ops.cross_entropy under autograd, torch.compile, opcheck and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from ops.cross_entropy_cases import (
    DTYPES,
    make,
    run,
)
from seqkern import ops

# ---------------------------------------------------------------- autograd, compile, autocast


GRADCHECK_OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "none"},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"z_loss": 0.1, "softcap": 1.5},
]


@pytest.mark.parametrize("options", GRADCHECK_OPTIONS, ids=str)
def test_gradcheck(backend: Any, options: dict[str, Any]) -> None:
    logits, target = make(3, 5, torch.float64, backend.device)
    function = lambda x: ops.cross_entropy(x, target, return_lse=True, **options)  # noqa: E731
    assert torch.autograd.gradcheck(function, logits.requires_grad_())


@pytest.mark.parametrize("options", GRADCHECK_OPTIONS, ids=str)
def test_gradgradcheck(backend: Any, options: dict[str, Any]) -> None:
    logits, target = make(3, 5, torch.float64, backend.device)
    function = lambda x: ops.cross_entropy(x, target, return_lse=True, **options)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, logits.requires_grad_())


def test_gradgradcheck_class_probabilities(backend: Any) -> None:
    logits, _ = make(3, 5, torch.float64, backend.device)
    target = torch.rand(3, 5, dtype=torch.float64, device=backend.device)
    inputs = (logits.requires_grad_(), target.requires_grad_())
    assert torch.autograd.gradcheck(ops.cross_entropy, inputs)
    assert torch.autograd.gradgradcheck(ops.cross_entropy, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("probabilities", [False, True])
def test_opcheck(backend: Any, dtype: torch.dtype, reduction: int, probabilities: bool) -> None:
    logits, target = make(4, 11, dtype, backend.device)
    if probabilities:
        target = torch.rand(4, 11, device=backend.device).to(dtype)
    options = (None, -100, reduction, 0.1, 1e-3, 2.0)
    raw: Any = backend.ops
    opcheck(raw.cross_entropy_forward.default, (logits, target, *options, True))
    loss, lse, saved = raw.cross_entropy_forward(logits, target, *options, True)
    arguments = (torch.ones_like(loss), torch.ones_like(lse), logits, target, None, saved)
    opcheck(raw.cross_entropy_backward.default, (*arguments, *options[1:]))
    opcheck(raw.cross_entropy.default, (logits.requires_grad_(), target, *options, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend: Any, dynamic: bool) -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        return 2 * ops.cross_entropy(3 * x, t, label_smoothing=0.1)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (4, 6):
        logits, target = make(N, 33, torch.float32, backend.device)
        loss, grad = run(compiled, logits, target)
        expected_loss, expected_grad = run(step, logits, target)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(grad, expected_grad)


def test_autocast(backend: Any) -> None:
    """Logits of an autocast linear layer are bfloat16; the loss is float32, with no copy made."""
    head = torch.nn.Linear(8, 21, device=backend.device)
    hidden = torch.randn(5, 8, device=backend.device)
    target = torch.randint(0, 21, (5,), device=backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        logits = head(hidden)
        loss = ops.cross_entropy(logits, target)
        torch_loss = F.cross_entropy(logits, target)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch_loss)
    loss.backward()
    assert head.weight.grad is not None


def test_gradient_accumulates_into_shared_logits(backend: Any) -> None:
    x = torch.randn(3, 9, device=backend.device, requires_grad=True)
    target = torch.tensor([1, 2, 3], device=backend.device)
    before = x.detach().clone()
    (ops.cross_entropy(x, target) + x.square().sum()).backward()
    y = before.clone().requires_grad_()
    (F.cross_entropy(y, target) + y.square().sum()).backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert torch.equal(x.detach(), before)


def test_logits_changed_before_backward(backend: Any) -> None:
    x = torch.randn(3, 9, device=backend.device, requires_grad=True)
    logits = x * 1
    loss = ops.cross_entropy(logits, torch.tensor([1, 2, 3], device=backend.device))
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("ignore_index", [-100, 1, 7, 150])
def test_an_ignored_target_is_no_class_of_a_weighted_loss(backend: Any, ignore_index: int) -> None:
    # What lies beside the weights is not theirs; their gradient is that of the others.
    beside = torch.full((301,), torch.nan, device=backend.device)
    weight = beside[150:157].fill_(1.5)
    logits = torch.randn(40, 7, device=backend.device, requires_grad=True)
    target = torch.randint(0, 7, (40,), device=backend.device)
    target[30] = ignore_index
    options = {"weight": weight, "ignore_index": ignore_index}
    loss, lse = ops.cross_entropy(logits, target, return_lse=True, **options)
    (grad,) = torch.autograd.grad(loss + lse.sum(), logits)
    plain = F.cross_entropy(logits, target, **options) + logits.logsumexp(1).sum()
    (expected,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(grad, expected)
