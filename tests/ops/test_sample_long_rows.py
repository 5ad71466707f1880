"""ops.sample of long rows: on CUDA blocks share one from 4097 tokens on, in ways that depend on
what is asked for, and draw what the CPU draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ops.sample_cases import counts_of, logits_of, penalised
from seqkern import ops
from seqkern.ops import _registry

LONG_OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.2, "min_p": 0.1},
    {"top_k": 1},
    {"top_k": 9, "temperature": 3.0},
    {"top_k": 9, "top_p": 0.7, "min_p": 0.05},
    {"top_k": 700},
    {"top_k": 700, "top_p": 0.9},
    {"top_k": 40, "top_p": 0.999, "min_p": 0.02},  # top-p ends where top-k does, or nearly
    {"top_k": 700, "top_p": 0.9, "temperature": 0.05},  # no mass is left where top-k ends
    {"top_k": 2000, "top_p": 0.6, "temperature": 30.0, "repetition_penalty": 1.3},
    {"top_p": 0.9},
    {"top_p": 0.9, "temperature": 30.0, "min_p": 0.5},
    {"top_p": 1e-12},
    {"top_p": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.3},
]


def assert_as_on_the_cpu(backend: Any, logits: Tensor, options: dict[str, Any]) -> None:
    if penalised(options):
        options = {**options, "token_counts": counts_of(*logits.shape)}
    with _registry.use_namespace("seqkern"):
        tokens, logprobs = ops.sample(logits, seed=6, step=2, **options)
    on_device = {
        k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in options.items()
    }
    ours = ops.sample(logits.to(backend.device), seed=6, step=2, **on_device)
    assert torch.equal(ours[0].cpu(), tokens)
    torch.testing.assert_close(ours[1].cpu(), logprobs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", LONG_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_long_rows(backend: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    """At any alignment: 4503 elements from row to row, of which the first is left out."""
    assert_as_on_the_cpu(backend, logits_of(3, 4503, 3.0).to(dtype)[:, 1:], options)


def assert_no_distribution(backend: Any, logits: Tensor, options: dict[str, Any]) -> None:
    """The first row at fault is named; on a device, where nobody looks, each has token -1."""
    logits[0, 5999], logits[1, 3] = torch.nan, torch.inf
    logits[2] = -torch.inf
    counts = torch.zeros(4, 6000, dtype=torch.int32, device=backend.device)
    logits = logits.to(backend.device)
    if backend.name == "cpu":
        with pytest.raises(ValueError, match=r"sample: logits must .* in row 0"):
            ops.sample(logits, token_counts=counts, **options)
        return
    tokens, logprobs = ops.sample(logits, token_counts=counts, **options)
    assert tokens[:3].tolist() == [-1, -1, -1]
    assert logprobs[:3].isnan().all()
    assert int(tokens[3]) >= 0


@pytest.mark.parametrize("options", LONG_OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "equal", "no distribution"])
def test_long_rows_with_logprobs_of_the_model(
    backend: Any, options: dict[str, Any], kind: str
) -> None:
    """The sum of all masses beside the others; with penalties its largest score is another."""
    options = {**options, "logprobs": "model"}
    logits = logits_of(4, 6000, 3.0)
    if kind == "no distribution":
        assert_no_distribution(backend, logits, options)
        return
    if kind == "equal":
        logits.zero_()
    assert_as_on_the_cpu(backend, logits, options)


@pytest.mark.parametrize("options", LONG_OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["equal", "ties", "banned", "no distribution"])
def test_long_rows_of_special_scores(backend: Any, options: dict[str, Any], kind: str) -> None:
    """More tokens of one score than a list takes; most tokens at -inf; NaN and infinities."""
    logits = logits_of(4, 6000)
    if kind == "equal":
        logits.zero_()
    elif kind == "ties":
        logits.round_()
    elif kind == "banned":
        logits[:, torch.arange(6000) % 1000 != 7] = -torch.inf
    else:
        assert_no_distribution(backend, logits, options)
        return
    assert_as_on_the_cpu(backend, logits, options)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("logprobs", ["drawn", "model"])
def test_long_rows_of_different_ways(backend: Any, logprobs: str, penalty: float) -> None:
    """Each row goes its own way, which only the device knows."""
    rows = 7
    options = {
        "temperature": torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.1]),
        "top_k": torch.tensor([900, 5, 0, 900, 900, 0, 900]),
        "top_p": torch.tensor([0.9, 0.9, 0.9, 1.0, 0.9, 1.0, 0.99]),
        "min_p": torch.tensor([0.0, 0.0, 0.01, 0.0, 0.01, 0.1, 0.0]),
        "presence_penalty": torch.full((rows,), 1 - penalty),
        "repetition_penalty": torch.full((rows,), penalty),
        "logprobs": logprobs,
    }
    assert_as_on_the_cpu(backend, logits_of(rows, 5000, 2.0), options)


@pytest.mark.parametrize("k", [600, 601, 1800, 2399, 2400, 2401])
@pytest.mark.parametrize("top_p", [0.3, 0.7, 0.9, 0.999])
def test_both_cuts_of_a_long_row_among_ties(backend: Any, k: int, top_p: float) -> None:
    """600 tokens each of scores 1.75, 1.5, .. -0.5: on, before and behind their borders."""
    logits = (torch.arange(6000) * 7 % 10 / 4 - 0.5).expand(2, 6000)
    assert_as_on_the_cpu(backend, logits, {"top_k": k, "top_p": top_p})
