"""Gradients, double gradients, compilation and autocast of ops.linear_cross_entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from benchmarks.memory import peak_extra
from seqkern import ops

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "none"},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"z_loss": 0.1, "softcap": 1.5},
    {"return_lse": True, "return_logprobs": True},
    {"return_logprobs": True, "reduction": "none", "softcap": 1.5},
]


def make(
    dtype: torch.dtype, device: str, N: int = 3, H: int = 4, V: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias as leaves, and a target with an ignored row."""
    leaves = [torch.randn(shape).to(device, dtype) for shape in ((N, H), (V, H), (V,))]
    target = torch.randint(0, V, (N,), device=device)
    target[1] = -100
    hidden, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    return hidden, weight, bias, target


def logits_loss(h: Tensor, w: Tensor, t: Tensor, b: Tensor | None = None) -> Tensor:
    return F.cross_entropy(F.linear(h, w, b), t)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(backend: Any, options: dict[str, Any]) -> None:
    *leaves, target = make(torch.float64, backend.device)
    function = lambda h, w, b: ops.linear_cross_entropy(h, w, target, b, **options)  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(leaves))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradgradcheck(backend: Any, options: dict[str, Any]) -> None:
    *leaves, target = make(torch.float64, backend.device)
    function = lambda h, w, b: ops.linear_cross_entropy(h, w, target, b, **options)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, tuple(leaves))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "all but bias"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_frozen_inputs_get_no_gradient(backend: Any, frozen: str, reduction: str) -> None:
    hidden, weight, bias, target = make(torch.float64, backend.device)
    every = {"hidden": hidden, "weight": weight, "bias": bias}
    out = [frozen] if frozen in every else ["hidden", "weight"]
    for name in out:
        every[name].requires_grad_(False)
    left = [t for name, t in every.items() if name not in out]
    loss = ops.linear_cross_entropy(hidden, weight, target, bias, reduction=reduction)
    grads = torch.autograd.grad(loss.sum(), left)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), target, reduction=reduction)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), left))


def test_frozen_inputs_are_not_computed(backend: Any) -> None:
    """Their part of what the op returns is empty, so nobody multiplied for it."""
    hidden, weight, bias, target = (t.detach() for t in make(torch.float32, backend.device))
    raw: Any = backend.ops
    options = (None, -100, 1, 0.0, 0.0, 0.0, False, False)
    out = raw.linear_cross_entropy_forward(
        hidden, weight, target, bias, *options, False, True, False, 0
    )
    assert [t.numel() for t in out[4:]] == [0, weight.numel(), 0]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"return_logprobs": True}], ids=str)
def test_backward_again_through_a_kept_graph(
    backend: Any, options: dict[str, Any], scale: float
) -> None:
    hidden, weight, bias, target = make(torch.float32, backend.device)
    out = ops.linear_cross_entropy(hidden, weight, target, bias, **options)
    loss = scale * (out[0] if isinstance(out, tuple) else out).sum()
    for _ in range(3):
        loss.backward(retain_graph=True)
    ours = [t.grad for t in (hidden, weight, bias)]
    expected = F.cross_entropy(
        F.linear(hidden, weight, bias), target, reduction=options.get("reduction", "mean")
    )
    grads = torch.autograd.grad(3 * scale * expected.sum(), (hidden, weight, bias))
    torch.testing.assert_close(ours, list(grads))


def test_gradients_are_the_callers_own(backend: Any) -> None:
    """What autograd has handed out changes neither the graph nor another result."""
    hidden, weight, bias, target = make(torch.float32, backend.device)
    loss = ops.linear_cross_entropy(hidden, weight, target, bias)
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    second = torch.autograd.grad(loss, (hidden, weight, bias))
    torch.testing.assert_close(list(second), kept)


def test_gradient_accumulates(backend: Any) -> None:
    hidden, weight, bias, target = make(torch.float32, backend.device)
    for factor in (1.0, 0.5):
        (factor * ops.linear_cross_entropy(hidden, weight, target, bias)).backward()
    expected = torch.autograd.grad(1.5 * logits_loss(hidden, weight, target, bias), weight)[0]
    torch.testing.assert_close(weight.grad, expected)


def test_a_weight_tied_to_an_embedding(backend: Any) -> None:
    weight = torch.randn(7, 4, device=backend.device, requires_grad=True)
    tokens = torch.tensor([1, 5, 2], device=backend.device)
    (ours,) = torch.autograd.grad(
        ops.linear_cross_entropy(F.embedding(tokens, weight), weight, tokens), weight
    )
    (theirs,) = torch.autograd.grad(
        logits_loss(F.embedding(tokens, weight), weight, tokens), weight
    )
    torch.testing.assert_close(ours, theirs)


def test_inputs_changed_before_backward(backend: Any) -> None:
    hidden, weight, _, target = make(torch.float32, backend.device)
    scaled = hidden * 1
    loss = ops.linear_cross_entropy(scaled, weight, target)
    with torch.no_grad():
        scaled.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_float16_gradients_below_its_range_survive_a_loss_scale(backend: Any) -> None:
    """p / N of a rare class is below float16; made for a loss of 1, it must not be lost before the
    loss scale comes."""
    N, V, scale = 64, 50, 2.0**20
    _, weight, bias, target = make(torch.float16, backend.device, N, 4, V)
    hidden = (torch.rand(N, 4) + 0.5).to(backend.device, torch.float16)
    target[target == 7] = 0
    with torch.no_grad():
        weight *= 0.01
        bias[7] = -10.0
    loss = ops.linear_cross_entropy(hidden, weight, target, bias)
    assert isinstance(loss, Tensor)
    (grad,) = torch.autograd.grad(loss * scale, weight)
    exact = logits_loss(hidden.double(), weight.double(), target, bias.double())
    (expected,) = torch.autograd.grad(scale * exact, weight)
    torch.testing.assert_close(grad[7], expected[7], rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck(backend: Any, dtype: torch.dtype, reduction: int) -> None:
    hidden, weight, bias, target = make(dtype, backend.device)
    options = (None, -100, reduction, 0.1, 1e-3, 2.0)
    wanted, grads = (reduction == 0, reduction == 0), (True, True, True)
    raw: Any = backend.ops
    values = (hidden.detach(), weight.detach(), target, bias.detach())
    arguments = (*values, *options, *wanted, *grads, 0)
    opcheck(raw.linear_cross_entropy_forward.default, arguments)
    loss, lse, logprobs, saved, *_ = raw.linear_cross_entropy_forward(*arguments)
    upstream = (torch.ones_like(loss), *(torch.ones_like(t) for t in (lse, logprobs)))
    if reduction:
        upstream = (upstream[0], None, None)
    opcheck(
        raw.linear_cross_entropy_backward.default,
        (*upstream, *values, None, saved, *options[1:], 0, 0, *grads, 0),
    )
    opcheck(raw.linear_cross_entropy_state.default, (*values, None, -100, 0.1, 2.0, 0, 0, 0))
    opcheck(
        raw.linear_cross_entropy.default,
        (hidden, weight, target, bias, *options, *wanted, *grads, 0),
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "label_smoothing": 0.1}], ids=str)
def test_compile_fullgraph(backend: Any, dynamic: bool, options: dict[str, Any]) -> None:
    def step(h: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        loss = ops.linear_cross_entropy(3 * h, w, t, b, **options)
        assert isinstance(loss, Tensor)
        return 2 * loss.sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (4, 6):
        *leaves, target = make(torch.float32, backend.device, N)
        loss, expected = compiled(*leaves, target), step(*leaves, target)
        torch.testing.assert_close(loss, expected)
        grads = torch.autograd.grad(loss, leaves)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves))


def test_the_registered_op_may_be_run_backward_twice(backend: Any) -> None:
    hidden, weight, bias, target = make(torch.float32, backend.device)
    raw: Any = backend.ops
    options = (None, -100, 1, 0.0, 0.0, 0.0, False, False, True, True, True, 0)
    loss = raw.linear_cross_entropy(hidden, weight, target, bias, *options)[0]
    for _ in range(2):
        (2 * loss).backward(retain_graph=True)
    expected = torch.autograd.grad(4 * logits_loss(hidden, weight, target, bias), weight)[0]
    torch.testing.assert_close(weight.grad, expected)


def test_autocast_casts_as_linear_does(backend: Any) -> None:
    hidden, weight, bias, target = make(torch.float32, backend.device, 6, 8, 20)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        loss = ops.linear_cross_entropy(hidden, weight, target, bias)
    assert isinstance(loss, Tensor)
    assert loss.dtype == torch.float32
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in (hidden, weight, bias)]
    exact = logits_loss(rounded[0], rounded[1], target, rounded[2])
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    exact_grads = torch.autograd.grad(exact, rounded)
    for grad, expected in zip(grads, exact_grads, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad.double(), expected, rtol=5e-3, atol=5e-3 * 0.1)


def test_no_gradient_no_graph(backend: Any) -> None:
    hidden, weight, bias, target = make(torch.float32, backend.device)
    with torch.no_grad():
        loss = ops.linear_cross_entropy(hidden, weight, target, bias)
    assert isinstance(loss, Tensor)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, logits_loss(hidden, weight, target, bias).detach())


@pytest.mark.parametrize("mode", ["mean", "none", "no_grad"])
def test_peak_memory_is_a_fraction_of_the_logits_way(mode: str) -> None:
    N, H, V = 2048, 16, 8192
    hidden = torch.randn(N, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    target = torch.randint(0, V, (N,))
    reduction = "mean" if mode == "no_grad" else mode

    def step(loss_of: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            with torch.set_grad_enabled(mode != "no_grad"):
                loss = loss_of().sum()
            if mode != "no_grad":
                torch.autograd.grad(loss, (hidden, weight))

        run()  # what is loaded or cached once is there already
        return run

    ours = step(lambda: ops.linear_cross_entropy(hidden, weight, target, reduction=reduction))
    theirs = step(lambda: F.cross_entropy(F.linear(hidden, weight), target, reduction=reduction))
    cpu = torch.device("cpu")
    plain, peak = peak_extra(theirs, cpu, 0), peak_extra(ours, cpu, 0)
    assert plain is not None
    assert peak is not None
    assert plain > 4 * N * V
    assert peak < 0.25 * plain


@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
def test_row_losses_changed_in_place(backend: Any, shape: tuple[int, ...]) -> None:
    hidden = torch.randn(*shape, 4, device=backend.device, requires_grad=True)
    weight = torch.randn(5, 4, device=backend.device)
    target = torch.randint(0, 5, shape, device=backend.device)
    losses = ops.linear_cross_entropy(hidden, weight, target, reduction="none")
    (found,) = torch.autograd.grad(losses.mul_(0.5).sum(), hidden)
    (all_of_it,) = torch.autograd.grad(
        ops.linear_cross_entropy(hidden, weight, target, reduction="sum"), hidden
    )
    torch.testing.assert_close(found, all_of_it / 2)
