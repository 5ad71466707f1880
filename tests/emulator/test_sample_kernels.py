"""What only the emulator can show of sampling: independence of blocks and of their order."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from seqkern import ops
from seqkern.ops import _registry


@pytest.fixture
def emulator(emulator_library: Path) -> Iterator[ctypes.CDLL]:
    library = ctypes.CDLL(str(emulator_library))
    library.seqkern_emu_set_seed.argtypes = [ctypes.c_uint64]
    library.seqkern_emu_set_device.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_bool]
    with _registry.use_namespace("seqkern_emu"):
        yield library
    library.seqkern_emu_set_device(4, 227 * 1024, True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 10},
        {"top_p": 0.9},
        {"top_k": 3000, "temperature": 2.0},
        {"top_k": 3000, "top_p": 0.9},
        {"logprobs": "model"},
    ],
    ids=str,
)
def test_a_token_does_not_depend_on_blocks_and_their_order(
    emulator: ctypes.CDLL, options: dict[str, Any]
) -> None:
    logits = 3 * torch.randn(2, 9000)
    results = []
    for seed, multiprocessors in enumerate([1, 4, 64]):
        emulator.seqkern_emu_set_seed(seed)
        emulator.seqkern_emu_set_device(multiprocessors, 227 * 1024, True)
        results.append(ops.sample(logits, seed=3, **options))
    for tokens, logprobs in results[1:]:
        assert torch.equal(tokens, results[0][0])
        assert torch.equal(logprobs, results[0][1])


@pytest.mark.parametrize("multiprocessors", [1, 4])  # more runs than a warp has lanes, or fewer
@pytest.mark.parametrize(
    "options",
    [{"top_k": 40}, {"top_k": 5000, "top_p": 0.5, "logprobs": "model"}, {"min_p": 0.05}],
    ids=str,
)
def test_runs_of_several_tiles(
    emulator: ctypes.CDLL, options: dict[str, Any], multiprocessors: int
) -> None:
    emulator.seqkern_emu_set_device(multiprocessors, 227 * 1024, True)
    logits = 3 * torch.randn(1, 530_001)
    tokens, logprobs = ops.sample(logits, **options)
    with _registry.use_namespace("seqkern"):
        expected = ops.sample(logits, **options)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logprobs, expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_more_rows_than_are_launched_at_once(emulator: ctypes.CDLL) -> None:
    logits = torch.randn(1, 4097).expand(513, 4097)
    tokens, logprobs = ops.sample(logits, top_k=5)
    with _registry.use_namespace("seqkern"):
        expected = ops.sample(logits, top_k=5)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logprobs, expected[1], rtol=1e-6, atol=1e-6)
