"""The resident recurrent kernels as a real GPU's size splits them.

The emulator pretends to be small devices (test_lstm_resident.py), and on a GPU of a hundred
multiprocessors the small shapes of the other tests are all split alike: these reach weights held in
registers and beyond them, several passes over the rows, several batch groups, several launches.
"""

from __future__ import annotations

from typing import Any

import hidden_cases
import pytest
import test_lstm as lstm_cases
import torch

from recurrent import compare, run, some_lengths
from seqkern import ops

# (T, B, input width, H) and dtype; where 132 multiprocessors put the weights.
SHAPES = {
    "registers-and-shared-memory": ((40, 45, 64, 1024), torch.bfloat16),
    "two-groups-of-units-and-the-workspace": ((5, 70, 16, 2100), torch.bfloat16),
    "the-workspace-float32": ((5, 45, 16, 1200), torch.float32),
    "the-workspace-float64": ((3, 20, 16, 800), torch.float64),
    "launches": ((3, 1100, 16, 1024), torch.bfloat16),
    "launches-float16": ((3, 1100, 16, 640), torch.float16),
}
on_gpu = pytest.mark.parametrize("backend", ["cuda"], indirect=True)


@on_gpu
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), SHAPES.values(), ids=SHAPES)
def test_lstm_matches_torch(
    backend: Any, shape: tuple[int, int, int, int], dtype: torch.dtype, with_lengths: bool
) -> None:
    lengths = some_lengths(shape[1], shape[0], backend.device) if with_lengths else None
    cases = (lstm_cases.ours, lstm_cases.theirs, lstm_cases.exact)
    functions = (f(with_lengths, lengths) for f in cases)
    compare(*functions, lambda: lstm_cases.make(shape, dtype, backend.device))


@on_gpu
@pytest.mark.parametrize("cell", ["gru", "tanh"])
@pytest.mark.parametrize(("shape", "dtype"), SHAPES.values(), ids=SHAPES)
def test_gru_and_rnn_match_torch(
    backend: Any, shape: tuple[int, int, int, int], dtype: torch.dtype, cell: str
) -> None:
    functions = (f(cell) for f in (hidden_cases.ours, hidden_cases.theirs, hidden_cases.exact))
    compare(*functions, lambda: hidden_cases.make(cell, shape, dtype, backend.device))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_thousands_of_exchanges_give_the_same_bits_each_time(
    backend: Any, dtype: torch.dtype
) -> None:
    """What a block reads too early, before another has written it, changes from run to run."""
    tensors = lstm_cases.make((3000, 33, 8, 512), dtype, backend.device)
    first, *others = (run(lstm_cases.ours(), tensors) for _ in range(5))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(3000, 33, 8, 512), (500, 1, 8, 768), (300, 128, 8, 1024), (200, 32, 8, 2048)],
    ids=str,
)
def test_both_exchanges_give_the_same_bits(
    backend: Any,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> None:
    """Values that tell their round are fetched before they are known to be there, in copies that
    no fence orders (csrc/cuda/resident_exchange.cuh); flags are waited for first. Several stages,
    passes and sets of units, every buffer written hundreds of times."""
    tensors = lstm_cases.make(shape, dtype, backend.device)
    monkeypatch.setenv("SEQKERN_LSTM_EXCHANGE", "flags")
    with torch.no_grad():
        expected = lstm_cases.ours()(*tensors)
        monkeypatch.setenv("SEQKERN_LSTM_EXCHANGE", "values")
        for _ in range(5):
            for a, b in zip(lstm_cases.ours()(*tensors), expected, strict=True):
                assert torch.equal(a, b)


@on_gpu
def test_two_streams_at_once(backend: Any) -> None:
    """Neither waits for blocks of the other that cannot begin, nor reads the other's workspace."""
    tensors = lstm_cases.make((200, 16, 8, 512), torch.bfloat16, backend.device)
    input, h0, c0, *weights = tensors
    expected, _ = ops.lstm(input, (h0, c0), *weights)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    outputs = []
    for _ in range(4):
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(ops.lstm(input, (h0, c0), *weights)[0])
    torch.cuda.synchronize()
    for output in outputs:
        assert torch.equal(output, expected)
