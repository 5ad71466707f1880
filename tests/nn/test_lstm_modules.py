"""nn.LSTM is torch's, with another forward."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from recurrent_modules import Unpacked, assert_same, flat, gradients
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqkern
from recurrent import some_lengths

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layers": {"num_layers": 3},
    "no-bias": {"bias": False, "num_layers": 2},
    "batch-first": {"batch_first": True},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "projection": {"proj_size": 3, "num_layers": 2},
    "all": {"bidirectional": True, "num_layers": 2, "proj_size": 3, "batch_first": True},
}


def pair(device: str, **options: Any) -> tuple[Any, Any]:
    """torch's LSTM 5 -> 7 and ours with its weights, in float64."""
    theirs = torch.nn.LSTM(5, 7, **options).to(device, torch.float64)
    ours = seqkern.nn.LSTM(5, 7, **options).to(device, torch.float64)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def states(module: Any, B: int, device: str) -> tuple[Tensor, Tensor]:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    P = module.proj_size or module.hidden_size
    make = lambda *size: torch.randn(*size, dtype=torch.float64, device=device)  # noqa: E731
    return make(rows, B, P), make(rows, B, module.hidden_size)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_matches_torch(backend: Any, options: dict[str, Any], state: bool) -> None:
    ours, theirs = pair(backend.device, **options)
    x = torch.randn(4, 4, 5, dtype=torch.float64, device=backend.device)
    hx = states(ours, 4, backend.device) if state else ()
    call = lambda m, x, *hx: m(x, hx or None)  # noqa: E731
    assert_same(
        gradients(Unpacked(ours, call), None, x, *hx),
        gradients(Unpacked(theirs, call), None, x, *hx),
    )


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_packed_sequences(
    backend: Any, options: dict[str, Any], state: bool, is_sorted: bool
) -> None:
    ours, theirs = pair(backend.device, **options)
    x = torch.randn(6, 4, 5, dtype=torch.float64, device=backend.device)
    lengths = torch.tensor([6, 4, 4, 1] if is_sorted else [4, 1, 6, 4])
    hx = states(ours, 4, backend.device) if state else ()

    def call(module: Any, x: Tensor, *hx: Tensor) -> list[Tensor]:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=is_sorted)
        output, last = module(packed, hx or None)
        padded, found = pad_packed_sequence(output)
        assert torch.equal(found, lengths)
        return [output.data, padded, *last]

    assert_same(
        gradients(Unpacked(ours, call), None, x, *hx),
        gradients(Unpacked(theirs, call), None, x, *hx),
    )


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_lengths_are_packing_without_packing(
    backend: Any, options: dict[str, Any], state: bool
) -> None:
    ours, theirs = pair(backend.device, **options)
    first = options.get("batch_first", False)
    size = (4, 6, 5) if first else (6, 4, 5)
    x = torch.randn(*size, dtype=torch.float64, device=backend.device)
    lengths = some_lengths(4, 6, backend.device)
    hx = states(ours, 4, backend.device) if state else ()

    def packing(module: Any, x: Tensor, *hx: Tensor) -> list[Tensor]:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=first, enforce_sorted=False)
        output, last = module(packed, hx or None)
        return [pad_packed_sequence(output, batch_first=first, total_length=6)[0], *last]

    def direct(module: Any, x: Tensor, *hx: Tensor) -> Any:
        return module(x, hx or None, lengths=lengths)

    assert_same(
        gradients(Unpacked(ours, direct), None, x, *hx),
        gradients(Unpacked(theirs, packing), None, x, *hx),
    )


@pytest.mark.parametrize("batch_first", [False, True])
def test_cells_of_every_step(backend: Any, batch_first: bool) -> None:
    ours, _ = pair(backend.device, num_layers=2, bidirectional=True, batch_first=batch_first)
    size = (3, 4, 5) if batch_first else (4, 3, 5)
    x = torch.randn(*size, dtype=torch.float64, device=backend.device)
    _, (_, c_n), cells = ours(x, return_cells=True)
    time = 2 if batch_first else 1
    torch.testing.assert_close(cells.select(time, 3)[::2], c_n[::2])
    torch.testing.assert_close(cells.select(time, 0)[1::2], c_n[1::2])


def test_unbatched(backend: Any) -> None:
    ours, theirs = pair(backend.device, num_layers=2)
    x = torch.randn(6, 5, dtype=torch.float64, device=backend.device)
    h, c = (s.squeeze(1) for s in states(ours, 1, backend.device))
    call = lambda m, x, h, c: m(x, (h, c))  # noqa: E731
    assert_same(
        gradients(Unpacked(ours, call), None, x, h, c),
        gradients(Unpacked(theirs, call), None, x, h, c),
    )


def test_dropout_between_layers(backend: Any) -> None:
    ours, theirs = pair(backend.device, num_layers=2, dropout=0.5)
    x = torch.randn(6, 4, 5, dtype=torch.float64, device=backend.device)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    ours.train()
    torch.manual_seed(1)
    first = ours(x)[0]
    torch.manual_seed(1)
    again = ours(x)[0]
    assert torch.equal(first, again)
    assert not torch.allclose(first, ours(x)[0])


def test_gradients_in_eval_mode(backend: Any) -> None:
    ours, theirs = pair(backend.device)
    x = torch.randn(6, 4, 5, dtype=torch.float64, device=backend.device)
    call = lambda m, x: m(x)  # noqa: E731
    assert_same(
        gradients(Unpacked(ours.eval(), call), None, x),
        gradients(Unpacked(theirs, call), None, x),
    )


# ---------------------------------------------------------------- what a torch module is


def test_no_warning_of_flattened_parameters(backend: Any) -> None:
    ours = seqkern.nn.LSTM(5, 7, num_layers=2, device=backend.device)
    ours = copy.deepcopy(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(torch.randn(3, 2, 5, device=backend.device))[0].sum().backward()


@pytest.mark.parametrize("lengths", [False, True])
def test_compile_fullgraph(backend: Any, lengths: bool) -> None:
    module = seqkern.nn.LSTM(5, 7, num_layers=2, bidirectional=True, device=backend.device)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    given = {"lengths": torch.tensor([3, 4], device=backend.device)} if lengths else {}
    x = torch.randn(4, 2, 5, device=backend.device)
    found = flat(compiled(x, **given))
    for actual, expected in zip(found, flat(module(x, **given)), strict=True):
        torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(m(x, **given)[0].sum(), list(module.parameters()))
             for m in (compiled, module)]  # fmt: skip
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


def test_export_with_dynamic_batch_and_time(backend: Any) -> None:
    module = seqkern.nn.LSTM(5, 7, num_layers=2, device=backend.device)
    sizes = {0: torch.export.Dim("T", min=2, max=64), 1: torch.export.Dim("B", min=2, max=64)}
    x = torch.randn(4, 3, 5, device=backend.device)
    program = torch.export.export(module, (x,), dynamic_shapes=(sizes,))
    other = torch.randn(9, 6, 5, device=backend.device)
    for actual, expected in zip(flat(program.module()(other)), flat(module(other)), strict=True):
        torch.testing.assert_close(actual, expected)


def test_autocast(backend: Any) -> None:
    module = seqkern.nn.LSTM(5, 7, device=backend.device)
    x = torch.randn(4, 3, 5, device=backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        output, (h, c) = module(x)
    assert output.dtype == h.dtype == c.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), module(x)[0], rtol=0.05, atol=0.02)
    output.float().sum().backward()
    assert module.weight_hh_l0.grad.dtype == torch.float32


BAD_CALLS: dict[str, tuple[Any, str]] = {
    "dim": (lambda m, x, h: m(x[0, 0]), r"LSTM: input must have 2 or 3 dimensions, got \[5\]"),
    "features": (
        lambda m, x, h: m(x[..., :4]),
        r"LSTM: input must have 5 features in its last dimension, got \[4, 3, 4\]",
    ),
    "h": (lambda m, x, h: m(x, (h[:, :2], h)), r"hx\[0\] must be \[1, 3, 7\], got \[1, 2, 7\]"),
    "c": (lambda m, x, h: m(x, (h, h[:0])), r"hx\[1\] must be \[1, 3, 7\], got \[0, 3, 7\]"),
    "dtype": (lambda m, x, h: m(x.double()), "LSTM: input must be torch.float32 like the weights"),
    "unbatched-lengths": (
        lambda m, x, h: m(x[0], lengths=torch.tensor([1])),
        "LSTM: lengths must be None with unbatched input",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(backend: Any, name: str) -> None:
    call, text = BAD_CALLS[name]
    module = seqkern.nn.LSTM(5, 7, device=backend.device)
    x = torch.randn(4, 3, 5, device=backend.device)
    with pytest.raises(ValueError, match=text):
        call(module, x, torch.zeros(1, 3, 7, device=backend.device))


def test_compile_in_a_fresh_process() -> None:
    """Dynamo, imported after a module was made, traces it."""
    program = (
        "import sys, torch, seqkern\n"
        "module = seqkern.nn.LSTM(3, 4)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "x = torch.randn(5, 2, 3)\n"
        "compiled = torch.compile(module, fullgraph=True, backend='eager')\n"
        "torch.testing.assert_close(compiled(x), module(x))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("change", ["optimizer", "data", "swap", "state_dict", "to"])
def test_cell_sees_changed_weights(change: str, name: str) -> None:
    ours, theirs = getattr(seqkern.nn, name)(5, 7), getattr(torch.nn, name)(5, 7)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5)
    ours(x)
    for cell in (ours, theirs):
        if change == "optimizer":
            torch.func.functional_call(cell, dict(cell.named_parameters()), x)[0].sum().backward()
            torch.optim.SGD(cell.parameters(), lr=1.0).step()
        elif change == "data":
            cell.weight_ih.data.mul_(-2)
        elif change == "swap":
            cell.weight_ih.data = torch.ones_like(cell.weight_ih)
        elif change == "state_dict":
            cell.load_state_dict({k: v + 1 for k, v in cell.state_dict().items()})
        else:
            cell.to(torch.float64)
    x = x.to(ours.weight_ih.dtype)
    for actual, expected in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(actual, expected)
