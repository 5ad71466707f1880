"""ops.attention_step against the float64 reference, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from seqkern import ops, reference
from tests.accuracy import assert_accurate

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@dataclass
class Step:
    """Inputs of a call; rows have different numbers of tokens."""

    q: Tensor
    k_new: Tensor
    v_new: Tensor
    k_cache: Tensor
    v_cache: Tensor
    positions: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.q, self.k_new, self.v_new, self.k_cache, self.v_cache, self.positions)

    def to(self, dtype: torch.dtype, cache: torch.dtype | None = None) -> Step:
        """Copies in other dtypes; those of the caches."""
        floats = [t.to(dtype) for t in self.tensors[:3]]
        caches = [t.to(cache or dtype, copy=True) for t in self.tensors[3:5]]
        return Step(*floats, *caches, self.positions)

    def row(self, b: int) -> Step:
        return Step(*(t[b : b + 1].clone() for t in self.tensors))


def make(
    device: str,
    B: int = 2,
    NH: int = 4,
    NKV: int = 2,
    S: int = 1,
    D: int = 16,
    L: int = 40,
    positions: list[int] | None = None,
) -> Step:
    """Values that bfloat16 and float16 hold exactly; NaN in the cache beyond each row's tokens."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(torch.bfloat16).double().clamp(-4, 4).to(device)

    at = positions or [(7 * b + 3) % (L - S + 1) for b in range(B)]
    step = Step(
        random(B, NH, S, D),
        random(B, NKV, S, D),
        random(B, NKV, S, D),
        random(B, NKV, L, D),
        random(B, NKV, L, D),
        torch.tensor(at, device=device),
    )
    for b, p in enumerate(at):
        step.k_cache[b, :, p:] = torch.nan
        step.v_cache[b, :, p:] = torch.nan
    return step


def rotary(device: str, L: int, R: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(L)[:, None] * 10000.0 ** (-torch.arange(0, R, 2) / R)
    return angles.cos().to(device), angles.sin().to(device)


def compare(
    step: Step, dtype: torch.dtype, cache: torch.dtype | None = None, **options: Any
) -> None:
    """Ours, PyTorch's in the same dtype and the float64 truth: outputs and caches."""
    exact_step, torch_step, our_step = (
        step.to(torch.float64),
        step.to(dtype, cache),
        step.to(dtype, cache),
    )
    exact = reference.attention_step(*exact_step.tensors, **options)
    theirs = reference.attention_step(*torch_step.tensors, **options)
    ours = ops.attention_step(*our_step.tensors, **options)
    assert ours.dtype == dtype
    assert_accurate(ours, theirs, exact, dtype)
    for name in ("k_cache", "v_cache"):
        stored, expected, truth = (getattr(run, name) for run in (our_step, torch_step, exact_step))
        assert torch.equal(stored.isnan(), expected.isnan())
        if options.get("rotary") is None:
            torch.testing.assert_close(stored, expected, rtol=0, atol=0, equal_nan=True)
        else:
            assert_accurate(*(t.nan_to_num() for t in (stored, expected, truth)), stored.dtype)


SHAPES = [
    {"B": 1, "NH": 1, "NKV": 1, "D": 1, "L": 1},
    {"B": 3, "NH": 4, "NKV": 4, "D": 7},
    {"NH": 8, "NKV": 2, "D": 40},
    {"NH": 6, "NKV": 1, "D": 64, "L": 66, "positions": [65, 0]},
    {"S": 2, "D": 80, "L": 70, "positions": [68, 1]},
    {"S": 5, "NH": 3, "NKV": 3, "D": 17},
    {"S": 16, "NH": 2, "NKV": 1, "D": 8, "L": 130, "positions": [114, 0]},
    {"B": 1, "NH": 2, "NKV": 1, "D": 256, "L": 20},
    # On CUDA several tiles of shared memory, with more rows than go through it at once.
    {"B": 1, "NH": 9, "NKV": 1, "D": 160, "L": 140, "positions": [120]},
    {"B": 1, "NH": 5, "NKV": 1, "D": 250, "L": 75, "positions": [70]},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(backend: Any, shape: dict[str, Any], dtype: torch.dtype) -> None:
    compare(make(backend.device, **shape), dtype)


@pytest.mark.parametrize("positions", [[1100, 511], [512, 1023]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_runs_of_keys(dtype: torch.dtype, positions: list[int]) -> None:
    """Tokens on both sides of a border between runs."""
    compare(make("cpu", S=3, D=24, L=1200, positions=positions), dtype)
    compare(make("cpu", S=3, D=24, L=1200, positions=positions), dtype, window=600)


@pytest.mark.parametrize("positions", [[127, 400], [255, 126], [382, 0]], ids=str)
@pytest.mark.parametrize("NH", [2, 6, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_of_cuda(backend: Any, positions: list[int], NH: int, dtype: torch.dtype) -> None:
    """Runs there are shorter; new tokens lie on both sides of a border, and so does a window."""
    step = make(backend.device, S=3, NH=NH, D=24, L=403, positions=positions)
    compare(step, dtype)
    compare(step, dtype, window=140)


@pytest.mark.parametrize("window", [None, 4200])
def test_longer_runs_of_longer_rows(backend: Any, window: int | None) -> None:
    """A row's bits depend on neither the rows beside it nor the cache's capacity."""
    step = make(backend.device, NH=9, NKV=9, D=4, L=4400, positions=[4390, 90]).to(torch.float32)
    counters = torch.zeros(18, dtype=torch.int32, device=backend.device)
    together = ops.attention_step(*step.tensors, window=window, counters=counters)
    assert not counters.any()
    exact = reference.attention_step(*step.to(torch.float64).tensors, window=window)
    torchs = reference.attention_step(*step.to(torch.float32).tensors, window=window)
    assert_accurate(together, torchs, exact, torch.float32)
    alone = step.row(1)
    alone.k_cache, alone.v_cache = alone.k_cache[:, :, :100], alone.v_cache[:, :, :100]
    assert torch.equal(ops.attention_step(*alone.tensors, window=window), together[1:])


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("D", [15, 18, 20, 24])
@pytest.mark.parametrize("dtype", DTYPES)
def test_alignments_of_the_cache(backend: Any, D: int, offset: int, dtype: torch.dtype) -> None:
    """The same bits wherever the elements lie."""
    step = make(backend.device, B=2, S=2, D=D, L=9, positions=[7, 2]).to(dtype)
    room = torch.full((2, *step.k_cache.shape[:3], D + 2 * offset), 7.0, dtype=dtype)
    caches = room.to(backend.device)[..., offset : offset + D]
    caches[0], caches[1] = step.k_cache, step.v_cache
    out = ops.attention_step(*replaced(step, k_cache=caches[0], v_cache=caches[1]))  # type: ignore
    assert torch.equal(out, ops.attention_step(*step.tensors))
    torch.testing.assert_close(caches[0], step.k_cache, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(caches[1], step.v_cache, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [1.0, 2.0**-10, 2.0**10])
@pytest.mark.parametrize("cache", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_are_not_rounded(
    backend: Any, dtype: torch.dtype, cache: torch.dtype | None, size: float
) -> None:
    """Scores of tens, where 16 bits of a scaled query would show in the second digit."""
    if cache is not None and dtype != torch.float32:
        cache = dtype
    step = make(backend.device, NH=8, D=64, positions=[39, 20])
    step.q *= size
    ours = ops.attention_step(*step.to(dtype, cache).tensors, scale=2.9 / size)
    exact = reference.attention_step(*step.to(torch.float64).tensors, scale=2.9 / size)
    error = ((ours.double() - exact).abs().max() / exact.abs().max()).item()
    assert error <= (5e-6 if dtype == torch.float32 else 0.6 * torch.finfo(dtype).eps)


OPTIONS: list[dict[str, Any]] = [
    {"scale": 0.3},
    {"window": 1},
    {"window": 5},
    {"window": 1000},
    {"softcap": 2.0},
    {"scale": 1.0, "window": 9, "softcap": 5.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("S", [1, 4])
def test_options(backend: Any, options: dict[str, Any], S: int) -> None:
    compare(make(backend.device, S=S), torch.float32, **options)
    compare(make(backend.device, S=S), torch.float64, **options)


@pytest.mark.parametrize("R", [2, 8, 16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary(backend: Any, R: int, interleaved: bool, dtype: torch.dtype) -> None:
    table = rotary(backend.device, 44, R)
    step = make(backend.device, S=3)
    compare(step, dtype, rotary=table, rotary_interleaved=interleaved)


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("S", [1, 3])
def test_16_bit_cache_of_a_float32_model(backend: Any, cache: torch.dtype, S: int) -> None:
    compare(make(backend.device, S=S), torch.float32, cache)


def test_every_position_up_to_the_last(backend: Any) -> None:
    L, D = (6 if backend.tiny else 20), 8
    step = make(backend.device, B=1, L=L, D=D, positions=[0])
    k, v = (torch.randn(1, 2, L, D, device=backend.device) for _ in range(2))
    q = torch.randn(1, 4, L, D, device=backend.device)
    caches = step.k_cache.float(), step.v_cache.float()
    outs = []
    for p in range(L):
        here = torch.tensor([p], device=backend.device)
        at = slice(p, p + 1)
        outs.append(ops.attention_step(q[:, :, at], k[:, :, at], v[:, :, at], *caches, here))
    assert torch.equal(caches[0], k)
    assert torch.equal(caches[1], v)
    whole = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=2e-5, atol=2e-6)


def test_tokens_beyond_the_cache(backend: Any) -> None:
    step = make(backend.device, S=2, L=10, positions=[9, 8]).to(torch.float32)
    before = [t.clone() for t in (step.k_cache, step.v_cache)]
    if backend.name == "cpu":
        message = (
            r"positions must be in \[0, 8\] for 2 new tokens in a cache of 10, got 9 for row 0"
        )
        with pytest.raises(ValueError, match=message):
            ops.attention_step(*step.tensors)
        for cache, old in zip((step.k_cache, step.v_cache), before, strict=True):
            torch.testing.assert_close(cache, old, rtol=0, atol=0, equal_nan=True)
    else:
        out = ops.attention_step(*step.tensors)
        assert out[0, :, 1].isnan().all()
        assert torch.isfinite(out[0, :, 0]).all()
        assert torch.isfinite(out[1]).all()


def test_a_row_depends_on_nothing_around_it(backend: Any) -> None:
    step = make(backend.device, B=3, S=2, positions=[30, 3, 17]).to(torch.float32)
    rows = [step.row(b) for b in range(3)]
    together = ops.attention_step(*step.tensors)
    for b, row in enumerate(rows):
        assert torch.equal(ops.attention_step(*row.tensors), together[b : b + 1])


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    step = make("cpu", B=2, NH=8, NKV=2, D=64, L=3000, positions=[2990, 1700]).to(torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(ops.attention_step(*step.to(torch.float32).tensors))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_strided_inputs(backend: Any) -> None:
    """q, k and v as parts of one product, caches as parts of a larger one."""
    B, NH, S, D, L = 2, 2, 3, 16, 12
    qkv = torch.randn(B, S, 3, NH, D, device=backend.device)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, NH, S, D]
    big = torch.randn(2, B, L, NH, D + 5, device=backend.device)
    caches = big.transpose(2, 3)[..., :D]  # [2, B, NH, L, D]
    positions = torch.tensor([4, 9], device=backend.device)
    plain = [c.contiguous() for c in caches]
    rest = big[..., D:].clone()
    out = ops.attention_step(q, k, v, caches[0], caches[1], positions)
    expected = ops.attention_step(
        q.contiguous(), k.contiguous(), v.contiguous(), plain[0], plain[1], positions
    )
    assert torch.equal(out, expected)
    assert torch.equal(caches[0], plain[0])
    assert torch.equal(caches[1], plain[1])
    assert torch.equal(big[..., D:], rest)
    assert out.transpose(1, 2).is_contiguous()
    wide = torch.randn(B, NH, D, S, device=backend.device).transpose(2, 3)
    torch.testing.assert_close(
        ops.attention_step(wide, k, v, *plain, positions),
        ops.attention_step(wide.contiguous(), k, v, *plain, positions),
        rtol=0,
        atol=0,
    )


def test_no_rows(backend: Any) -> None:
    empty = torch.zeros(0, 2, 1, 4, device=backend.device)
    positions = torch.zeros(0, dtype=torch.int64, device=backend.device)
    assert ops.attention_step(*(empty,) * 5, positions).shape == (0, 2, 1, 4)


def test_opcheck(backend: Any) -> None:
    step = make(backend.device, S=2).to(torch.float32)
    for cache in (step.k_cache, step.v_cache):
        cache.nan_to_num_()
    tables = rotary(backend.device, 40, 8)
    counters = torch.zeros(4, dtype=torch.int32, device=backend.device)
    opcheck(backend.ops.attention_step, (*step.tensors, *tables, False, 0.25, 7, 3.0, counters))
    assert not counters.any()


def test_compiles_whole() -> None:
    def forward(*tensors: Tensor) -> Tensor:
        return ops.attention_step(*tensors, window=9) * 2  # type: ignore[arg-type]

    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    for B in (2, 3):
        step = make("cpu", B=B).to(torch.float32)
        ours, eager = step.to(torch.float32), step.to(torch.float32)
        torch.testing.assert_close(compiled(*ours.tensors), forward(*eager.tensors))
        torch.testing.assert_close(ours.k_cache, eager.k_cache, equal_nan=True)


def replaced(step: Step, **tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensors.get(name, t) for name, t in vars(step).items())


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({"q": torch.zeros(2, 4, 16)}, {}, r"q must be \[B, NH, S, D\], got float32 \[2, 4, 16\]"),
        ({"q": torch.zeros(2, 4, 17, 16)}, {}, "q must hold 1 to 16 new tokens"),
        ({"q": torch.zeros(2, 4, 1, 300)}, {}, "q must have a head width from 1 to 256"),
        (
            {"q": torch.zeros(2, 3, 1, 16)},
            {},
            "k_new must have a number of heads that divides the 3",
        ),
        ({"k_new": torch.zeros(2, 2, 2, 16)}, {}, r"k_new must be float32 \[2, 2, 1, 16\], got"),
        ({"v_new": torch.zeros(1, 2, 1, 16)}, {}, r"v_new must be float32 \[2, 2, 1, 16\], got"),
        (
            {"k_cache": torch.zeros(2, 2, 40, 16, dtype=torch.float64)},
            {},
            "k_cache must be float32, bfloat16 or float16, got float64",
        ),
        ({"v_cache": torch.zeros(2, 2, 39, 16)}, {}, r"v_cache must be float32 \[2, 2, 40, 16\]"),
        (
            {"v_cache": torch.zeros(2, 2, 16, 40).transpose(2, 3)},
            {},
            "v_cache must have stride 1 in its last dimension, got 40",
        ),
        (
            {"k_cache": torch.zeros(2, 2, 0, 16), "v_cache": torch.zeros(2, 2, 0, 16)},
            {},
            r"k_cache must hold at least the 1 new tokens, got float32 \[2, 2, 0, 16\]",
        ),
        (
            {"positions": torch.zeros(3, dtype=torch.int64)},
            {},
            r"positions must be int64 \[2\], got",
        ),
        ({"positions": torch.zeros(2)}, {}, r"positions must be int64 \[2\], got float32 \[2\]"),
        ({}, {"window": 0}, "window must be at least 1 or None, got 0"),
        ({}, {"softcap": -1.0}, "softcap must be at least 0 and finite, got -1"),
        ({}, {"softcap": float("inf")}, "softcap must be at least 0 and finite, got inf"),
        (
            {},
            {"rotary": (torch.zeros(40, 9), torch.zeros(40, 9))},
            r"cos must be \[positions, R / 2\] with R at most 16, got float32 \[40, 9\]",
        ),
        (
            {},
            {"rotary": (torch.zeros(40, 4), torch.zeros(39, 4))},
            r"sin must be contiguous float32 \[at least 40, 4\], got float32 \[39, 4\]",
        ),
    ],
)
def test_errors(
    backend: Any, tensors: dict[str, Tensor], options: dict[str, Any], message: str
) -> None:
    step = make(backend.device).to(torch.float32)
    tensors = {name: t.to(backend.device) for name, t in tensors.items()}
    if "rotary" in options:
        options = {"rotary": tuple(t.to(backend.device) for t in options["rotary"])}
    with pytest.raises(ValueError, match=f"^attention_step: {message}"):
        ops.attention_step(*replaced(step, **tensors), **options)  # type: ignore[arg-type]
