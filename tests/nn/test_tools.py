"""Tools of torch's that look into modules: torch.fx and torch.jit take ours as torch's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import seqkern
from seqkern import nn, ops

RECURRENT = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]


class Tagger(torch.nn.Module):
    """A model around a recurrent module, with a loss."""

    def __init__(self, package: Any, kind: str) -> None:
        super().__init__()
        self.project = torch.nn.Linear(3, 5)
        self.layer = getattr(package, kind)(5, 4)
        self.loss = package.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        result = self.layer(self.project(x))
        return result, self.loss(x, y)


def model(kind: str, package: Any = nn) -> Any:
    torch.manual_seed(1)
    return Tagger(package, kind).eval()


def leaves(result: Any) -> list[Tensor]:
    found: list[Tensor] = torch.utils._pytree.tree_leaves(result)
    return found


def arguments(kind: str, n: int = 6) -> tuple[Tensor, Tensor]:
    shape = (n, 3, 3) if kind in RECURRENT[:3] else (n, 3)
    target = torch.randint(3, (n, 3) if kind in RECURRENT[:3] else (n,))
    return torch.randn(shape), target


@pytest.mark.parametrize("kind", RECURRENT)
def test_symbolic_trace(kind: str) -> None:
    """One step for each of ours, as for torch's."""
    ours = model(kind)
    graph = fx.symbolic_trace(ours)
    theirs = fx.symbolic_trace(model(kind, torch.nn))
    steps = [[(n.op, n.target) for n in g.graph.nodes] for g in (graph, theirs)]
    assert steps[0] == steps[1]
    x, y = arguments(kind)
    for actual, expected in zip(leaves(graph(x, y)), leaves(ours(x, y)), strict=True):
        assert torch.equal(actual, expected)


def test_symbolic_trace_with_options() -> None:
    class Padded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(3, 4, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            return self.layer(x, lengths=lengths)

    module = Padded()
    x, lengths = torch.randn(2, 5, 3), torch.tensor([5, 2])
    found = fx.symbolic_trace(module)(x, lengths)
    for actual, expected in zip(found, module(x, lengths), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", RECURRENT)
def test_jit_trace(kind: str) -> None:
    """The graph is torch's own, and holds for other sizes where torch's does."""
    patched = model(kind, torch.nn)
    seqkern.patch(patched)
    traced = torch.jit.trace(patched, arguments(kind))
    assert "seqkern::" not in str(traced.inlined_graph)
    assert "PythonOp" not in str(traced.inlined_graph)
    x, y = arguments(kind, 4)
    for actual, expected in zip(leaves(traced(x, y)), leaves(patched(x, y)), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_of_what_torch_does_not_have() -> None:
    layer = nn.GRU(3, 4)
    loss = nn.CrossEntropyLoss(z_loss=0.1)
    x, lengths, y = torch.randn(5, 2, 3), torch.tensor([5, 2]), torch.randint(3, (5, 2))

    class All(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.loss = layer, loss

        def forward(self, x: Tensor, lengths: Tensor, y: Tensor) -> Any:
            q = x.transpose(0, 1)[:, None]
            read = self.layer(x, lengths=lengths), ops.causal_attention(q, q, q)
            return read, self.loss(x.flatten(0, 1), y.flatten())

    traced = torch.jit.trace(All(), (x, lengths, y))
    assert "PythonOp" not in str(traced.inlined_graph)
    other = torch.randn(5, 2, 3), torch.tensor([3, 4]), torch.randint(3, (5, 2))
    for actual, expected in zip(leaves(traced(*other)), leaves(All()(*other)), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", RECURRENT)
def test_jit_script(kind: str) -> None:
    """One line that says how, and the model is as it was; unpatched, it compiles."""
    patched = model(kind, torch.nn)
    seqkern.patch(patched)
    before = copy.copy(patched._modules)
    with pytest.raises(NotImplementedError, match=f"^{kind}: torch.jit.script .*unpatch") as raised:
        torch.jit.script(patched)
    assert "\n" not in str(raised.value)
    assert all(patched._modules[name] is part for name, part in before.items())
    seqkern.unpatch(patched)
    torch.jit.script(patched.layer)
