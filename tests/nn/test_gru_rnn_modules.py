"""nn.GRU and nn.RNN are torch's, with another forward."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from recurrent_modules import Unpacked, assert_same, flat, gradients
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqkern
from recurrent import some_lengths

#: class, and options that belong to it
MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "gru": ("GRU", {}),
    "tanh": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False, "num_layers": 2},
    "all": {"bidirectional": True, "num_layers": 2, "batch_first": True},
}

pytestmark = pytest.mark.parametrize("kind", MODULES)


def pair(kind: str, device: str, **options: Any) -> tuple[Any, Any]:
    """Our module 5 -> 7 and torch's with the same weights, in float64."""
    name, own = MODULES[kind]
    ours, theirs = (
        getattr(of.nn, name)(5, 7, **own, **options).to(device, torch.float64)
        for of in (seqkern, torch)
    )
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def states(module: Any, B: int, device: str) -> Tensor:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    return torch.randn(rows, B, 7, dtype=torch.float64, device=device)


def assert_alike(ours: Any, theirs: Any, ours_call: Any, theirs_call: Any, *given: Tensor) -> None:
    """Same outputs and gradients of tensors and parameters."""
    assert_same(
        gradients(Unpacked(ours, ours_call), None, *given),
        gradients(Unpacked(theirs, theirs_call), None, *given),
    )


def plain(module: Any, x: Tensor, *hx: Tensor) -> Any:
    return module(x, *hx)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_matches_torch(backend: Any, kind: str, options: dict[str, Any], state: bool) -> None:
    ours, theirs = pair(kind, backend.device, **options)
    x = torch.randn(4, 4, 5, dtype=torch.float64, device=backend.device)
    hx = (states(ours, 4, backend.device),) if state else ()
    assert_alike(ours, theirs, plain, plain, x, *hx)


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_packed_sequences(
    backend: Any, kind: str, options: dict[str, Any], is_sorted: bool
) -> None:
    ours, theirs = pair(kind, backend.device, **options)
    x = torch.randn(6, 4, 5, dtype=torch.float64, device=backend.device)
    lengths = torch.tensor([6, 4, 4, 1] if is_sorted else [4, 1, 6, 4])

    def call(module: Any, x: Tensor, hx: Tensor) -> list[Tensor]:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=is_sorted)
        output, last = module(packed, hx)
        padded, found = pad_packed_sequence(output)
        assert torch.equal(found, lengths)
        return [output.data, padded, last]

    assert_alike(ours, theirs, call, call, x, states(ours, 4, backend.device))


@pytest.mark.parametrize("state", [False, True])
def test_lengths_are_packing_without_packing(backend: Any, kind: str, state: bool) -> None:
    ours, theirs = pair(kind, backend.device, **OPTIONS["all"])
    x = torch.randn(4, 6, 5, dtype=torch.float64, device=backend.device)
    lengths = some_lengths(4, 6, backend.device)
    hx = (states(ours, 4, backend.device),) if state else ()

    def packing(module: Any, x: Tensor, *hx: Tensor) -> list[Tensor]:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        output, last = module(packed, *hx)
        return [pad_packed_sequence(output, batch_first=True, total_length=6)[0], last]

    def direct(module: Any, x: Tensor, *hx: Tensor) -> Any:
        return module(x, *hx, lengths=lengths)

    assert_alike(ours, theirs, direct, packing, x, *hx)


def test_unbatched(backend: Any, kind: str) -> None:
    ours, theirs = pair(kind, backend.device, num_layers=2)
    x = torch.randn(6, 5, dtype=torch.float64, device=backend.device)
    assert_alike(ours, theirs, plain, plain, x, states(ours, 1, backend.device).squeeze(1))


def test_dropout_between_layers(backend: Any, kind: str) -> None:
    ours, theirs = pair(kind, backend.device, num_layers=2, dropout=0.5)
    x = torch.randn(6, 4, 5, dtype=torch.float64, device=backend.device)
    torch.testing.assert_close(ours.eval()(x)[0], theirs.eval()(x)[0])
    ours.train()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(ours(x)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


def test_gradients_in_eval_mode_and_no_warnings(backend: Any, kind: str) -> None:
    ours, theirs = pair(kind, backend.device, num_layers=2)
    ours = copy.deepcopy(ours)
    x = torch.randn(6, 4, 5, dtype=torch.float64, device=backend.device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_alike(ours.eval(), theirs, plain, plain, x)


def test_compile_fullgraph(backend: Any, kind: str) -> None:
    ours, _ = pair(kind, backend.device, num_layers=2, bidirectional=True)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 2, 5, dtype=torch.float64, device=backend.device)
    lengths = torch.tensor([3, 4], device=backend.device)
    results = []
    for module in (compiled, ours):
        outputs = flat(module(x, lengths=lengths))
        grads = torch.autograd.grad(outputs[0].sum(), list(ours.parameters()))
        results.append([*outputs, *grads])
    assert_same(*results)


def test_export_with_dynamic_batch_and_time(backend: Any, kind: str) -> None:
    ours, _ = pair(kind, backend.device)
    sizes = {0: torch.export.Dim("T", min=2, max=64), 1: torch.export.Dim("B", min=2, max=64)}
    x = torch.randn(4, 3, 5, dtype=torch.float64, device=backend.device)
    program = torch.export.export(ours, (x,), dynamic_shapes=(sizes,))
    other = torch.randn(9, 6, 5, dtype=torch.float64, device=backend.device)
    assert_same(flat(program.module()(other)), flat(ours(other)))


def test_autocast(backend: Any, kind: str) -> None:
    module, torchs = (module.float() for module in pair(kind, backend.device))
    x = torch.randn(4, 3, 5, device=backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        output, h = module(x)
        expected, _ = torchs(x)
    assert output.dtype == h.dtype == expected.dtype
    torch.testing.assert_close(output.float(), module(x)[0], rtol=0.05, atol=0.02)
    output.float().sum().backward()
    assert module.weight_hh_l0.grad.dtype == torch.float32


def test_bad_calls(backend: Any, kind: str) -> None:
    module = pair(kind, backend.device)[0]
    x = torch.randn(4, 3, 5, dtype=torch.float64, device=backend.device)
    name = MODULES[kind][0]
    with pytest.raises(ValueError, match=rf"{name}: input must have 5 features .* \[4, 3, 4\]"):
        module(x[..., :4])
    with pytest.raises(ValueError, match=rf"{name}: hx must be \[1, 3, 7\], got \[1, 2, 7\]"):
        module(x, x.new_zeros(1, 2, 7))
    with pytest.raises(ValueError, match="lengths must be None with unbatched input"):
        module(x[0], lengths=torch.tensor([1]))
    with pytest.raises(ValueError, match=f"{name}: input must be torch.float64 like the weights"):
        module(x.float())
