"""Every op on tensors without data: on one device like all others, and of shapes that fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from every_op import OPS, flat
from seqkern import ops


@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "requires_grad"])
@pytest.mark.parametrize("name", OPS)
def test_each_input_on_another_device(name: str, grad: bool) -> None:
    """Refused in one line that names an argument and both devices, as in a compiled program."""
    case = OPS[name]
    tensors = case.make(3)
    if len(tensors) == 1:
        return
    for i in range(len(tensors)):
        leaves = [
            t.to("meta" if i == j else "cpu").requires_grad_(
                grad and case.gradients and t.is_floating_point()
            )
            for j, t in enumerate(tensors)
        ]
        words = r"^\w+: \w+ must be on the device of \w+, (cpu, got meta|meta, got cpu)$"
        with pytest.raises(ValueError, match=words):
            case.call(*leaves)


@pytest.mark.parametrize("name", OPS)
def test_all_on_meta(name: str) -> None:
    tensors = OPS[name].make(3)
    expected = flat(OPS[name].call(*tensors))
    actual = flat(OPS[name].call(*[t.to("meta") for t in tensors]))
    assert [(t.shape, t.dtype, t.device.type) for t in actual] == [
        (t.shape, t.dtype, "meta") for t in expected
    ]


def test_optional_arguments() -> None:
    q = torch.randn(1, 2, 5, 8)
    lengths = torch.tensor([3], device="meta")
    with pytest.raises(ValueError, match="lengths must be on the device of q, cpu, got meta"):
        ops.causal_attention(q, q, q, lengths=lengths)
    with pytest.raises(ValueError, match="temperature must be on the device of logits"):
        ops.sample(torch.randn(2, 5), temperature=torch.ones(2, device="meta"))


def test_fakes_of_two_devices() -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match="target must be on the device of"):
        ops.cross_entropy(
            torch.randn(3, 4, device="cuda"), torch.zeros(3, dtype=torch.long, device="cpu")
        )


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", OPS)
def test_rows_that_do_not_agree(name: str, device: str) -> None:
    """One more of what an input shares with the others: the same on meta as on the CPU."""
    case = OPS[name]
    sizes = case.sizes
    if len([s for s in sizes if s]) < 2:
        return
    for i, size in enumerate(sizes):
        if not size:
            continue
        tensors: list[Tensor] = [
            (case.make(4) if i == j else case.make(3))[j].to(device) for j in range(len(sizes))
        ]
        if name == "causal_attention" and i == 0:
            continue  # fewer keys than queries: what may be, depends on both
        with pytest.raises(ValueError, match=r"^\w+: \w+ must be .*, got "):
            case.call(*tensors)


def gates(device: str) -> dict[str, Any]:
    make: Any = lambda *size: torch.randn(size, device=device)  # noqa: E731
    return {
        "input": make(3, 2, 5),
        "h0": make(2, 4),
        "w_ih": make(12, 5),
        "w_hh": make(12, 4),
        "b_ih": make(12),
        "b_hh": make(12),
        "lengths": torch.ones(2, dtype=torch.int64, device=device),
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("argument", ["h0", "w_ih", "w_hh", "b_ih", "b_hh", "lengths"])
def test_layers(argument: str, device: str) -> None:
    """Each tensor of a layer one longer."""
    tensors = gates(device)
    ops.gru(**tensors)
    for d in range(tensors[argument].dim()):
        wrong = torch.cat([tensors[argument], tensors[argument].narrow(d, 0, 1)], d)
        # Of the recurrent weight the others are measured, so another one may be named.
        with pytest.raises(ValueError, match=r"^gru: \w+ must be .*, got "):
            ops.gru(**{**tensors, argument: wrong})
