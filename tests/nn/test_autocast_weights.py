"""Weights under autocast on the CPU: cast once for several calls, never used when stale."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import seqkern
from seqkern.ops import _autocast

KINDS = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]
LOW = torch.bfloat16


def pair(kind: str) -> tuple[Any, Any]:
    """Ours and torch's, with the same weights."""
    ours, theirs = getattr(seqkern.nn, kind)(16, 32), getattr(torch.nn, kind)(16, 32)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def output(module: Any, x: Tensor) -> Tensor:
    """Of a step [5, 16], for sequences of one step."""
    if isinstance(module, torch.nn.RNNBase):
        y: Tensor = module(x.unsqueeze(0))[0]
        return y.squeeze(0)
    result = module(x)
    return result if isinstance(result, Tensor) else result[0]


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The parameters that are cast."""
    found: list[Any] = []
    real = _autocast.autocast

    def counted(*tensors: Any) -> Any:
        results = real(*tensors)
        found.extend(
            t
            for t, cast in zip(tensors, results, strict=True)
            if isinstance(t, torch.nn.Parameter) and cast is not t
        )
        return results

    monkeypatch.setattr(_autocast, "autocast", counted)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_once_in_a_region(kind: str, casts: list[Any]) -> None:
    ours, _ = pair(kind)
    x = torch.randn(5, 16)
    with torch.no_grad():
        for regions in (1, 2):
            with torch.autocast("cpu", LOW):
                for _ in range(20):
                    output(ours, x)
                with torch.autocast("cpu", LOW):
                    output(ours, x)
            assert len(casts) == 4 * regions
        with torch.autocast("cpu", LOW, cache_enabled=False):
            output(ours, x)
            output(ours, x)
        assert len(casts) == 16
        output(ours, x)
        assert len(casts) == 16


@pytest.mark.parametrize("kind", KINDS)
def test_few_calls_share_a_cast_that_has_a_gradient(kind: str, casts: list[Any]) -> None:
    ours, _ = pair(kind)
    with torch.autocast("cpu", LOW):
        for _ in range(17):
            output(ours, torch.randn(5, 16))
    assert len(casts) == 3 * 4


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_gradients_of_many_steps(kind: str) -> None:
    """Near float32's, where torch's sums in 16 bits are not."""
    ours, theirs = pair(kind)
    x = torch.randn(1000, 5, 16)

    def gradients(module: Any, enabled: bool) -> list[Tensor]:
        module.zero_grad()
        with torch.autocast("cpu", LOW, enabled=enabled):
            loss: Any = sum(output(module, x_t).float().sum() for x_t in x)
        loss.backward()
        return [p.grad.clone() for p in module.parameters()]

    def error(found: list[Tensor]) -> float:
        pairs = zip(found, exact, strict=True)
        return max(((a - b).norm() / b.norm()).item() for a, b in pairs)

    exact = gradients(ours, False)
    assert error(gradients(ours, True)) < 0.01
    assert error(gradients(theirs, True)) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_calls_differentiated_one_by_one(kind: str) -> None:
    """Also after calls without gradients."""
    results = []
    for keeps in (True, False):
        torch.manual_seed(0)
        ours, _ = pair(kind)
        x = torch.randn(3, 5, 16)
        with torch.autocast("cpu", LOW, cache_enabled=keeps):
            for context in (torch.inference_mode, torch.no_grad):
                with context():
                    output(ours, x[0])
            losses = []
            for x_t in x:
                losses.append(output(ours, x_t).float().square().sum())
                losses[-1].backward()
        results.append([*losses, *(p.grad for p in ours.parameters())])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    assert results[0][3].any()


def add_in_place(module: Any) -> None:
    with torch.no_grad():
        next(iter(module.parameters())).add_(0.5)


def swap_memory(module: Any) -> None:
    next(iter(module.parameters())).data = torch.full((module.weight_rows, 16), 0.3)


def swap_parameter(module: Any) -> None:
    name = next(name for name, _ in module.named_parameters())
    setattr(module, name, torch.nn.Parameter(torch.full((module.weight_rows, 16), 0.3)))


def optimize(module: Any) -> None:
    module.zero_grad()
    output(module, torch.ones(5, 16)).float().sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.5).step()


@pytest.mark.parametrize("change", [add_in_place, swap_memory, swap_parameter, optimize])
@pytest.mark.parametrize("kind", KINDS)
def test_changes_within_a_region(kind: str, change: Callable[[Any], None]) -> None:
    ours, _ = pair(kind)
    ours.weight_rows = next(iter(ours.parameters())).shape[0]
    x = torch.randn(5, 16)
    with torch.autocast("cpu", LOW):
        before = output(ours, x)
        change(ours)
        after = output(ours, x)
    with torch.autocast("cpu", LOW):
        assert torch.equal(output(ours, x), after)
    assert not torch.equal(before, after)


def test_frozen_and_thawed() -> None:
    ours, _ = pair("GRUCell")
    x = torch.randn(5, 16)
    ours.requires_grad_(False)
    with torch.autocast("cpu", LOW):
        assert not ours(x).requires_grad
        ours.requires_grad_()
        ours(x).float().sum().backward()
    assert ours.weight_ih.grad.any()


def test_each_dtype_has_its_own() -> None:
    ours, theirs = pair("RNNCell")
    x = torch.randn(5, 16)
    with torch.autocast("cpu", LOW):
        assert ours(x).dtype == LOW
        with torch.autocast("cpu", torch.float16):
            assert ours(x).dtype == torch.float16
            torch.testing.assert_close(ours(x).float(), theirs(x).float(), atol=0.02, rtol=0.02)


def test_nothing_outlives_the_region() -> None:
    ours, _ = pair("LSTM")
    with torch.autocast("cpu", LOW):
        output(ours, torch.randn(5, 16))
        kept = _autocast._region()
        assert kept is not None
        refs = [weakref.ref(t) for c in kept.values() for t in c.results if t is not None]
        del kept
        assert len(refs) == 4
        assert all(ref() is not None for ref in refs)
    assert all(ref() is None for ref in refs)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_and_traces_cast_for_themselves(kind: str) -> None:
    """What they make of a weight is theirs alone."""
    ours, _ = pair(kind)
    x = torch.randn(5, 16)
    with torch.autocast("cpu", LOW):
        expected = output(ours, x)
        compiled = torch.compile(lambda x: output(ours, x), backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        other = {key: p.detach() + 0.5 for key, p in ours.named_parameters()}
        swapped = torch.func.functional_call(
            ours, other, (x.unsqueeze(0),) if kind in KINDS[:3] else (x,)
        )
        swapped = swapped if isinstance(swapped, Tensor) else swapped[0]
        assert not torch.equal(swapped.reshape(5, 32), expected)
        assert torch.equal(output(ours, x), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    """A forward that is repeated in the backward meets other casts of the same weights."""
    ours, _ = pair("GRUCell")
    x = torch.randn(12, 5, 16, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        h = None
        for x_t in x:
            h = ours(x_t, h)
        assert h is not None
        return h

    found = []
    for repeats in (False, True):
        ours.zero_grad()
        with torch.autocast("cpu", LOW):
            h = checkpoint(run, x, use_reentrant=reentrant) if repeats else run(x)
        h.float().square().sum().backward()
        found.append([p.grad.clone() for p in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
