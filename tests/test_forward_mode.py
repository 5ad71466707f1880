"""Forward-mode derivatives: the references', or where an op has none, an error that says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from every_op import MODULES, OPS, build, flat
from seqkern import ops

MESSAGE = "no forward-mode derivative"
#: Ops that decode, which have no derivatives: zeros in their place would be a wrong answer.
DECODING = [name for name, case in OPS.items() if not case.gradients]
TRAINED = [name for name, case in OPS.items() if case.gradients]


def numbers(tensors: list[Tensor]) -> list[int]:
    return [n for n, t in enumerate(tensors) if t.is_floating_point()]


def difference(function: Callable[..., Any], tensors: list[Tensor], n: int) -> list[Tensor]:
    """The derivative along ones of tensor n, of results in float64 by differences."""

    def at(step: float) -> list[Tensor]:
        moved = [t + step if i == n else t for i, t in enumerate(tensors)]
        return flat(function(*moved))

    step = 1e-5
    return [(a - b) / (2 * step) for a, b in zip(at(step), at(-step), strict=True)]


@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "requires_grad"])
@pytest.mark.parametrize("name", TRAINED)
def test_each_input_of_each_op(name: str, grad: bool) -> None:
    call = OPS[name].call
    tensors = [t.double() if t.is_floating_point() else t for t in OPS[name].make(3)]
    for n in numbers(tensors):
        leaves = [t.detach().requires_grad_(grad and t.is_floating_point()) for t in tensors]
        with forward_ad.dual_level():
            leaves[n] = forward_ad.make_dual(leaves[n], torch.ones_like(tensors[n]))
            found = [forward_ad.unpack_dual(t).tangent for t in flat(call(*leaves))]
        for tangent, expected in zip(found, difference(call, tensors, n), strict=True):
            wanted = expected if tangent is None else expected - tangent
            torch.testing.assert_close(wanted, torch.zeros_like(wanted), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", DECODING)
def test_ops_that_decode(name: str) -> None:
    tensors = OPS[name].make(3)
    for n in numbers(tensors):
        duals = list(tensors)
        with forward_ad.dual_level():
            duals[n] = forward_ad.make_dual(duals[n], torch.ones_like(duals[n]))
            with pytest.raises(NotImplementedError, match=f"^{name}: {MESSAGE}"):
                OPS[name].call(*duals)


@pytest.mark.parametrize("transform", [torch.func.jvp, torch.func.jacfwd], ids=lambda t: t.__name__)
@pytest.mark.parametrize("name", DECODING)
def test_transforms_of_ops_that_decode(name: str, transform: Any) -> None:
    first, *others = OPS[name].make(3)

    def function(x: Tensor) -> Tensor:
        return flat(OPS[name].call(x, *others))[-1]

    arguments: Any = ((first,), (torch.ones_like(first),)) if transform is torch.func.jvp else ()
    with pytest.raises(NotImplementedError, match=MESSAGE):
        transform(function, *arguments) if arguments else transform(function)(first)


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    """Along the input, and along the parameters."""
    module, case = build(name)
    module.double().requires_grad_(False)
    first, *others = (t.double() if t.is_floating_point() else t for t in case.make(3))
    found = torch.func.jvp(lambda x: flat(module(x, *others))[0], (first,), (first + 1 - first,))[1]
    expected = difference(module, [first, *others], 0)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    weights = {key: p.detach() for key, p in module.named_parameters()}
    if not weights:
        return

    def of_weights(*values: Tensor) -> Any:
        given = dict(zip(weights, values, strict=True))
        return torch.func.functional_call(module, given, (first, *others))

    values = list(weights.values())
    along = tuple(torch.ones_like(v) if n == 0 else v * 0 for n, v in enumerate(values))
    found = torch.func.jvp(lambda *v: flat(of_weights(*v))[0], tuple(values), along)[1]
    torch.testing.assert_close(found, difference(of_weights, values, 0)[0], atol=1e-6, rtol=0)


def test_functional_jacobian() -> None:
    target, x = torch.tensor([1, 2]), torch.randn(2, 5)
    by_strategy = [
        torch.autograd.functional.jacobian(
            lambda x: ops.cross_entropy(x, target, reduction="none"),
            x,
            strategy=strategy,
            vectorize=True,
        )
        for strategy in ("forward-mode", "reverse-mode")
    ]
    torch.testing.assert_close(*by_strategy)


def test_of_an_outer_level() -> None:
    """The op sees a tensor of an outer `jvp`, inside another or inside `vmap`."""

    def inside_jvp(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.func.jvp(lambda y: y + f(x), (x.detach(),), (x.detach(),))[0]

    x = torch.randn(2, 5)
    for wrap in (inside_jvp, torch.func.vmap):
        found = torch.func.jvp(wrap(ops.softmax), (x,), (x,))
        expected = torch.func.jvp(wrap(lambda y: y.softmax(-1)), (x,), (x,))
        torch.testing.assert_close(found, expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        found = forward_ad.unpack_dual(torch.func.vmap(ops.softmax)(dual))
        expected = forward_ad.unpack_dual(dual.softmax(-1))
        torch.testing.assert_close(found.tangent, expected.tangent)

    def beside(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda y: y + ops.softmax(x.detach()), (x,), (x,))[0]

    torch.testing.assert_close(torch.func.jvp(beside, (x,), (x,))[1], x)


def test_nothing_to_differentiate() -> None:
    """What has no tangent is computed in a level, too, and what was detached from it."""
    x = torch.randn(2, 5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        expected = ops.softmax(x)
        assert torch.equal(ops.softmax(dual.detach()), expected)
        with forward_ad._set_fwd_grad_enabled(False):
            assert torch.equal(ops.softmax(dual), expected)
