"""ops.sample: the drawn distribution is the defined one, and the same token is drawn everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from ops.sample_cases import V, counts_of, logits_of, penalised
from seqkern import ops, reference
from seqkern.ops import _registry

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.3},
    {"temperature": 4.0},
    {"temperature": 1e-310},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": V + 5},
    {"top_p": 0.5},
    {"top_p": 1e-12},
    {"top_p": 0.97},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"presence_penalty": 1.0, "frequency_penalty": 0.4},
    {"frequency_penalty": -0.5},
    {
        "temperature": 1.3,
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.04,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.1,
    },
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_follow_the_definition(options: dict[str, Any]) -> None:
    """Chi-squared, and nothing that is truncated is ever drawn."""
    N = 100_000
    logits = logits_of(1)
    if penalised(options):
        options = {**options, "token_counts": counts_of(1)}
    p = reference.token_distribution(logits, **options)[0]
    if "token_counts" in options:
        options["token_counts"] = options["token_counts"].expand(N, V)
    tokens, logprobs = ops.sample(logits.expand(N, V), seed=11, **options)
    observed = torch.bincount(tokens, minlength=V).double()
    assert (observed[p == 0] == 0).all()
    expected = N * p[p > 0]
    rare = expected < 5  # chi-squared is not defined for them
    chi2 = ((observed[p > 0] - expected).square() / expected)[~rare].sum()
    degrees = int((~rare).sum()) - 1
    # Four standard deviations: one seed in 10,000 would fail; this one is fixed.
    assert chi2 <= degrees + 4 * (2 * max(degrees, 1)) ** 0.5
    torch.testing.assert_close(logprobs.double(), p[tokens].log(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_library_draws_the_same_tokens(
    backend: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    rows = 6 if backend.tiny else 50
    logits = logits_of(rows, 300, 3.0).to(dtype)
    if penalised(options):
        options = {**options, "token_counts": counts_of(rows, 300)}
    with _registry.use_namespace("seqkern"):
        tokens, logprobs = ops.sample(logits, seed=5, step=3, **options)
    on_device = {
        k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in options.items()
    }
    ours = ops.sample(logits.to(backend.device), seed=5, step=3, **on_device)
    assert torch.equal(ours[0].cpu(), tokens)
    torch.testing.assert_close(ours[1].cpu(), logprobs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [1, 2, 33, 257, 4099])
def test_odd_vocabularies(backend: Any, vocabulary: int) -> None:
    logits = logits_of(3, vocabulary, 2.0).to(backend.device)
    options: dict[str, Any] = {"top_k": max(1, vocabulary // 3), "top_p": 0.8}
    p = reference.token_distribution(logits.cpu(), **options)
    for step in range(2 if backend.tiny else 20):
        tokens, logprobs = ops.sample(logits, seed=1, step=step, **options)
        drawn = p.gather(1, tokens.cpu()[:, None])[:, 0]
        assert (drawn > 0).all()
        torch.testing.assert_close(logprobs.cpu().double(), drawn.log(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("vocabulary", [50257, 128256, 1_100_000])
@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_p": 0.95}, {"top_k": 5000}], ids=str)
def test_large_vocabularies(vocabulary: int, options: dict[str, Any]) -> None:
    """Beyond 2^20 tokens a run is more than one block; beyond 2^19 masses have fewer bits."""
    logits = logits_of(2, vocabulary, 3.0)
    p = reference.token_distribution(logits, **options)
    tokens, logprobs = ops.sample(logits, seed=4, **options)
    drawn = p.gather(1, tokens[:, None])[:, 0]
    assert (drawn > 0).all()
    torch.testing.assert_close(logprobs.double(), drawn.log(), rtol=1e-5, atol=1e-5)


def test_equal_scores_rank_by_lower_id(backend: Any) -> None:
    """Truncation within ties, across the blocks and chunks that kernels work by."""
    logits = torch.zeros(1, 700, device=backend.device)
    kept = {int(ops.sample(logits, top_k=3, step=s)[0]) for s in range(4 if backend.tiny else 200)}
    assert kept <= {0, 1, 2}
    tokens, logprobs = ops.sample(logits, top_p=0.5, seed=3)
    assert int(tokens) < 350
    torch.testing.assert_close(logprobs.cpu(), torch.tensor([1 / 350]).log())
    assert int(ops.sample(logits, temperature=0)[0]) == 0
    # Both cuts among the same ties: the earlier holds.
    both = ops.sample(logits, top_k=300, top_p=0.1)[1]
    torch.testing.assert_close(both.cpu(), torch.tensor([1 / 30]).log())
    signed = torch.tensor([[-0.0, 0.0]], device=backend.device)
    assert int(ops.sample(signed, top_k=1)[0]) == 0


def test_a_row_depends_on_nothing_around_it(backend: Any) -> None:
    rows = 4 if backend.tiny else 9
    logits = logits_of(rows, 100, 2.0).to(backend.device)
    seeds = torch.arange(rows, device=backend.device) + 100
    steps = torch.arange(rows, device=backend.device) * 3
    options: dict[str, Any] = {"top_p": 0.9, "temperature": 1.5}
    together = ops.sample(logits, seed=seeds, step=steps, **options)
    for b in range(rows):
        alone = ops.sample(logits[b : b + 1], seed=100 + b, step=3 * b, **options)
        assert torch.equal(alone[0], together[0][b : b + 1])
        assert torch.equal(alone[1], together[1][b : b + 1])


def test_rows_of_one_seed_draw_apart(backend: Any) -> None:
    logits = torch.zeros(8, 1000, device=backend.device)
    tokens = ops.sample(logits, seed=9)[0]
    assert tokens.unique().numel() > 4
    assert torch.equal(tokens, ops.sample(logits, seed=9)[0])
    assert not torch.equal(tokens, ops.sample(logits, seed=9, step=1)[0])
    assert not torch.equal(tokens, ops.sample(logits, seed=10)[0])


def test_options_per_row_equal_numbers(backend: Any) -> None:
    columns: dict[str, list[float]] = {
        "temperature": [0.0, 0.5, 1.0],
        "top_k": [0, 5, 40],
        "top_p": [1.0, 0.5, 0.25],
        "min_p": [0.0, 0.25, 0.5],
        "repetition_penalty": [1.0, 1.5, 2.0],
        "presence_penalty": [0.0, 0.5, 1.0],
        "frequency_penalty": [0.0, 0.25, -0.5],
    }
    logits, counts = (t.to(backend.device) for t in (logits_of(3, 50), counts_of(3, 50)))
    seeds = torch.tensor([1, 2, 3], device=backend.device)
    together = ops.sample(
        logits,
        seed=seeds,
        token_counts=counts,
        **{name: torch.tensor(values).to(backend.device) for name, values in columns.items()},  # type: ignore[arg-type]
    )
    for b in range(3):
        row: dict[str, Any] = {name: values[b] for name, values in columns.items()}
        alone = ops.sample(logits[b : b + 1], token_counts=counts[b : b + 1], seed=b + 1, **row)
        assert torch.equal(alone[0], together[0][b : b + 1])
        assert torch.equal(alone[1], together[1][b : b + 1])


def test_logprobs_of_the_model(backend: Any) -> None:
    logits, counts = (t.to(backend.device) for t in (logits_of(5, 60), counts_of(5, 60)))
    tokens, logprobs = ops.sample(
        logits,
        temperature=0.5,
        top_k=3,
        presence_penalty=1.0,
        token_counts=counts,
        logprobs="model",
    )
    expected = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-6)


def test_banned_tokens_are_never_drawn(backend: Any) -> None:
    logits = torch.full((4, 300), -torch.inf, device=backend.device)
    logits[:, [7, 270]] = torch.tensor([0.0, 1.0], device=backend.device)
    for options in ({}, {"top_k": 100}, {"top_p": 0.99}, {"temperature": 0}):
        tokens, logprobs = ops.sample(logits, **options)  # type: ignore[arg-type]
        assert set(tokens.tolist()) <= {7, 270}
        assert torch.isfinite(logprobs).all()


def test_penalties_that_leave_no_token(backend: Any) -> None:
    """Not blamed on the logits, which are healthy."""
    options: dict[str, Any] = {"presence_penalty": 1e300}
    options["token_counts"] = torch.ones(1, 2, dtype=torch.int32, device=backend.device)
    logits = torch.tensor([[0.5, 0.0]], device=backend.device)
    if backend.name == "cpu":
        with pytest.raises(ValueError, match=r"got penalties that leave none in row 0$"):
            ops.sample(logits, **options)
    else:
        assert int(ops.sample(logits, **options)[0]) == -1


def test_counts_beyond_32_bits_are_still_counts(backend: Any) -> None:
    """Of int64, beside kernels of int32: not taken for tokens that were never seen."""
    logits = torch.tensor([[0.5, 0.0]], device=backend.device)
    for count in (2**31 - 1, 2**31, 2**32, 2**62, -1, -(2**31) - 1, 5 - 2**32):
        counts = torch.tensor([[count, 0]], device=backend.device)
        token, _ = ops.sample(logits, temperature=0, presence_penalty=5.0, token_counts=counts)
        assert int(token) == (count > 0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, None], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 2, "top_p": 0.5}], ids=str)
def test_rows_without_a_distribution(
    backend: Any, bad: float | None, options: dict[str, Any]
) -> None:
    logits = logits_of(3, 40).to(backend.device)
    if bad is None:
        logits[1] = -torch.inf
    else:
        logits[1, 33] = bad
    if backend.name == "cpu":
        came = {None: "a maximum of -inf", torch.inf: "a maximum of inf"}.get(bad, "NaN")
        with pytest.raises(ValueError, match=rf"sample: logits must .*, got {came} in row 1$"):
            ops.sample(logits, **options)
    else:
        tokens, logprobs = ops.sample(logits, **options)
        assert int(tokens[1]) == -1
        assert torch.isnan(logprobs[1])
        assert (tokens[[0, 2]] >= 0).all()


def test_strided_logits(backend: Any) -> None:
    wide = logits_of(3, 90).to(backend.device)
    for strided in (wide[:, 5:85], wide[:, ::2], wide[:, :3].T, wide[:1].expand(3, 90)):
        ours = ops.sample(strided, seed=2)[0]
        assert torch.equal(ours, ops.sample(strided.contiguous(), seed=2)[0])


def test_no_rows(backend: Any) -> None:
    tokens, logprobs = ops.sample(torch.zeros(0, 5, device=backend.device))
    assert tokens.shape == logprobs.shape == (0,)


def test_opcheck(backend: Any) -> None:
    rows = torch.tensor([0.5, 1.0], device=backend.device)
    numbers = (1.0, 2, 0.9, 0.0, 1.0, 0.5, 0.0, 3, 4)
    arguments = (logits_of(2).to(backend.device), counts_of(2).to(backend.device), *numbers)
    opcheck(backend.ops.sample, (*arguments, rows, *(None,) * 8, False))


def test_compiles_whole() -> None:
    def step(logits: Tensor, position: Tensor) -> Tensor:
        return ops.sample(logits * 2, top_k=5, top_p=0.9, step=position)[0]

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (2, 5):
        logits, position = logits_of(rows), torch.full((rows,), 6)
        assert torch.equal(compiled(logits, position), step(logits, position))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits must be \[B, V\], got float32 \[3\]"),
        ({"logits": torch.zeros(2, 0)}, r"logits must be \[B, V\], got float32 \[2, 0\]"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, "logits must be float32, .* got int64"),
        ({"temperature": -0.1}, "temperature must be at least 0 and finite, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"top_k": -1}, r"top_k must be at least 0 \(0: all tokens\), got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
        ({"presence_penalty": 1.0}, r"token_counts must be given .* int64 \[2, 12\], got none"),
        (
            {"repetition_penalty": 0.0, "token_counts": counts_of(2)},
            "repetition_penalty must be above 0 and finite, got 0",
        ),
        (
            {"token_counts": counts_of(3)},
            r"token_counts must be int32 or int64 \[2, 12\], got int32 \[3, 12\]$",
        ),
        ({"seed": torch.zeros(3)}, r"seed must be a number or int64 \[2\], got float32 \[3\]"),
        ({"top_p": torch.zeros(3)}, r"top_p must be a number or float \[2\], got float32 \[3\]"),
        ({"logprobs": "both"}, "logprobs must be 'drawn' or 'model', got 'both'"),
    ],
)
def test_errors(backend: Any, arguments: dict[str, Any], message: str) -> None:
    arguments = {"logits": logits_of(2), **arguments}
    arguments = {
        k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in arguments.items()
    }
    with pytest.raises(ValueError, match=f"^sample: {message}"):
        ops.sample(**arguments)


def test_a_bad_value_for_one_row_is_named() -> None:
    """On the CPU; elsewhere looking would wait for the device."""
    with pytest.raises(ValueError, match=r"sample: top_p must be in \(0, 1\], got 2 for row 1"):
        ops.sample(logits_of(2), top_p=torch.tensor([0.5, 2.0]))


@pytest.mark.parametrize(
    ("value", "like"), [(1.5, 1.0), (torch.inf, 1.0), (torch.nan, 0.0), (-0.5, 0.0)]
)
def test_min_p_out_of_range_on_the_device_is_harmless(
    backend: Any, value: float, like: float
) -> None:
    """Nothing looks at it there: the token of the largest score stays whatever it is."""
    logits = logits_of(2, 200).to(backend.device)
    rows = torch.tensor([value, 0.5], dtype=torch.float64, device=backend.device)
    if backend.name == "cpu":
        with pytest.raises(
            ValueError, match=r"sample: min_p must be in \[0, 1\], got .* for row 0"
        ):
            ops.sample(logits, min_p=rows)
        return
    ours = ops.sample(logits, min_p=rows)
    expected = ops.sample(logits, min_p=torch.tensor([like, 0.5], device=backend.device))
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])
