"""Forward-mode derivatives, which no op has: each says so, where zeros would be a wrong answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from every_op import MODULES, OPS, build, flat
from seqkern import ops

MESSAGE = "no forward-mode derivative"
#: What its errors are called by, where that is not its name.
CALLED = {"causal_attention": "attention"}


@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "requires_grad"])
@pytest.mark.parametrize("name", OPS)
def test_each_input_of_each_op(name: str, grad: bool) -> None:
    case = OPS[name]
    tensors = case.make(3)
    for i, tensor in enumerate(tensors):
        if not tensor.is_floating_point():
            continue
        leaves = [
            t.detach().requires_grad_(grad and case.gradients and t.is_floating_point())
            for t in tensors
        ]
        with forward_ad.dual_level():
            leaves[i] = forward_ad.make_dual(leaves[i], torch.ones_like(tensor))
            with pytest.raises(NotImplementedError, match=f"^{CALLED.get(name, name)}: {MESSAGE}"):
                case.call(*leaves)


@pytest.mark.parametrize("transform", [torch.func.jvp, torch.func.jacfwd], ids=lambda t: t.__name__)
@pytest.mark.parametrize("name", OPS)
def test_transforms(name: str, transform: Any) -> None:
    first, *others = OPS[name].make(3)

    def function(x: Tensor) -> Tensor:
        return flat(OPS[name].call(x, *others))[-1]

    arguments: Any = ((first,), (torch.ones_like(first),)) if transform is torch.func.jvp else ()
    with pytest.raises(NotImplementedError, match=MESSAGE):
        transform(function, *arguments) if arguments else transform(function)(first)


@pytest.mark.parametrize("name", MODULES)
def test_modules_with_frozen_parameters(name: str) -> None:
    module, case = build(name)
    module.requires_grad_(False)
    first, *others = case.make(3)
    with pytest.raises(NotImplementedError, match=MESSAGE):
        torch.func.jvp(lambda x: flat(module(x, *others))[0], (first,), (first,))


def test_functional_jacobian() -> None:
    target = torch.tensor([1, 2])
    with pytest.raises(NotImplementedError, match=MESSAGE):
        torch.autograd.functional.jacobian(
            lambda x: ops.cross_entropy(x, target),
            torch.randn(2, 5),
            strategy="forward-mode",
            vectorize=True,
        )


def test_of_an_outer_level() -> None:
    """The op sees a tensor of an outer `jvp`, inside another or inside `vmap`."""

    def inside_jvp(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda y: y + ops.softmax(x), (x.detach(),), (x.detach(),))[0]

    def inside_vmap(x: Tensor) -> Tensor:
        return torch.func.vmap(ops.softmax)(x)

    x = torch.randn(2, 5)
    for function in (inside_jvp, inside_vmap):
        with pytest.raises(NotImplementedError, match=MESSAGE):
            torch.func.jvp(function, (x,), (x,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match=MESSAGE):
            inside_vmap(dual)
        assert inside_vmap(dual.detach()).isfinite().all()

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
