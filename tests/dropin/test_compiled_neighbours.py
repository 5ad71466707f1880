"""torch.compile of what is not ours, or cannot be in a graph: as without seqkern."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqkern


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_torchs_own_layers_stay_out_of_graphs(kind: str) -> None:
    """Those that nobody patched, and subclasses of them, train when they are compiled."""

    class Derived(getattr(torch.nn, kind)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            return super().forward(2 * x)

    x = torch.randn(5, 2, 6)
    for make in (getattr(torch.nn, kind), Derived):
        torch.compiler.reset()
        module = make(6, 8)
        getattr(seqkern.nn, kind)(1, 1)
        with seqkern.accelerate():
            pass
        compiled = torch.compile(module, backend="aot_eager")
        compiled(x)[0].square().sum().backward()
        found = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        module(x)[0].square().sum().backward()
        for actual, expected in zip(found, module.parameters(), strict=True):
            torch.testing.assert_close(actual, expected.grad)


class Padded(torch.nn.Module):
    """A layer over rows of different lengths, as is usual."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = getattr(torch.nn, kind)(6, 8, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output: Tensor = pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]
        return output


@pytest.mark.parametrize("how", ["patched", "accelerated"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_packed_sequences_break_a_graph(kind: str, how: str) -> None:
    torch.compiler.reset()
    model, x, lengths = Padded(kind), torch.randn(4, 7, 6), torch.tensor([3, 7, 2, 5])
    expected = model(x, lengths)
    wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    if how == "patched":
        seqkern.patch(model)
    compiled = torch.compile(model, backend="aot_eager")
    if how == "patched":
        found = compiled(x, lengths)
    else:
        with seqkern.accelerate():
            found = compiled(x, lengths)
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(found.square().sum(), list(model.parameters()))
    for actual, grad in zip(grads, wanted, strict=True):
        torch.testing.assert_close(actual, grad)
