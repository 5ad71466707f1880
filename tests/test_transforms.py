"""Ops and modules inside `torch.func`'s transforms, where they run as their references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, vmap

from every_op import MODULES, OPS, build, flat

TRAINED = [name for name, case in OPS.items() if case.gradients]
NAMES = [*TRAINED, *MODULES]


def numbers(tensors: list[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.is_floating_point()]


def exact(name: str) -> tuple[torch.nn.Module, Callable[[int], list[Tensor]]]:
    """A module and what makes its inputs in float64, where kernel and reference agree closely."""
    module, case = build(name)

    def make(n: int) -> list[Tensor]:
        return [t.double() if t.is_floating_point() else t for t in case.make(n)]

    return module.double(), make


def loss_of(module: Callable[..., Any], tensors: list[Tensor]) -> Callable[..., Tensor]:
    """A loss as a function of the floating-point tensors."""

    def loss(*given: Tensor) -> Tensor:
        left = iter(given)
        filled = [next(left) if t.is_floating_point() else t for t in tensors]
        return sum(r.square().sum() for r in flat(module(*filled)))  # type: ignore[return-value]

    return loss


@pytest.mark.parametrize("name", NAMES)
def test_grad(name: str) -> None:
    module, make = exact(name)
    tensors = make(4)
    loss = loss_of(module, tensors)
    leaves = [t.detach().requires_grad_() for t in numbers(tensors)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = grad(loss, tuple(range(len(leaves))))(*numbers(tensors))
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_per_sample(name: str) -> None:
    """`vmap` of `grad`: one call for what a loop gives."""
    module, make = exact(name)
    samples = [make(4) for _ in range(3)]
    weights = {key: p.detach() for key, p in module.named_parameters()}

    def gradients(weights: Any, *tensors: Tensor) -> Any:
        def of_both(weights: Any, first: Tensor) -> Tensor:
            def run(*given: Tensor) -> Any:
                return functional_call(module, weights, given)

            return loss_of(run, [first, *tensors[1:]])(*numbers([first, *tensors[1:]]))

        return grad(of_both, (0, 1))(weights, tensors[0])

    batch = [torch.stack(parts) for parts in zip(*samples, strict=True)]
    axes = (None, *[0] * len(batch))
    found = vmap(gradients, axes)(weights, *batch)
    for n, sample in enumerate(samples):
        leaf = sample[0].detach().requires_grad_()
        module.zero_grad()
        loss_of(module, [leaf, *sample[1:]])(*numbers([leaf, *sample[1:]])).backward()
        torch.testing.assert_close(found[1][n], leaf.grad)
        for key, p in module.named_parameters():
            wanted = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(found[0][key][n], wanted)


@pytest.mark.parametrize("name", NAMES)
def test_vmap(name: str) -> None:
    module, make = exact(name)
    samples = [make(4) for _ in range(3)]
    batch = [torch.stack(parts) for parts in zip(*samples, strict=True)]
    found = flat(vmap(module)(*batch))
    for n, sample in enumerate(samples):
        for actual, expected in zip(found, flat(module(*sample)), strict=True):
            torch.testing.assert_close(actual[n], expected)


@pytest.mark.parametrize("name", ["softmax", "cross_entropy", "causal_attention", "lstm_cell"])
def test_second_order(name: str) -> None:
    module, make = exact(name)
    tensors = make(2)
    loss = loss_of(module, tensors)
    first, *others = numbers(tensors)
    found = hessian(lambda x: loss(x, *others))(first)
    leaf = first.detach()
    expected = torch.autograd.functional.hessian(lambda x: loss(x, *others), leaf)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(jacrev(jacrev(lambda x: loss(x, *others)))(first), expected)
