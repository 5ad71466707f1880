"""ops.causal_attention against PyTorch and the float64 reference, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from accuracy import assert_accurate
from ops.attention_cases import (
    BACKENDS,
    DTYPES,
    NATIVE,
    OPTIONS,
    Sizes,
    exact,
    make,
    ours,
    resolve,
    run,
    sdpa,
    torchs,
)
from seqkern import _C, ops, reference

every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
native = pytest.mark.parametrize("backend", NATIVE, indirect=True)


def assert_all_accurate(actual: list[Tensor], theirs: list[Tensor], truth: list[Tensor]) -> None:
    """Each result by the rule; minus infinities of the log-sum-exp have to be the same."""
    assert len(actual) == len(theirs) == len(truth)
    for a, t, e in zip(actual, theirs, truth, strict=True):
        infinite = e == -torch.inf
        assert torch.equal(a == -torch.inf, infinite)
        a, t, e = (x.masked_fill(infinite, 0.0) for x in (a, t, e))
        assert_accurate(a, t, e, a.dtype)


def check(qkv: Any, **options: Any) -> None:
    actual = run(ours, qkv, **options)
    assert_all_accurate(actual, torchs(qkv, **options), exact(qkv, **options))


# ---------------------------------------------------------------- parity


SMALL = [
    Sizes(Tq=1, Tk=1, D=1),
    Sizes(Tq=2, Tk=2, D=5),
    Sizes(B=3, NH=4, NKV=4, Tq=1, Tk=7, D=8),
    Sizes(B=3, NH=4, NKV=2, Tq=17, Tk=17, D=8),
    Sizes(B=1, NH=3, NKV=1, Tq=5, Tk=19, D=16),
]


@every_backend
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("sizes", SMALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(
    backend: Any, dtype: torch.dtype, sizes: Sizes, options: dict[str, Any]
) -> None:
    qkv = make(sizes, dtype, backend.device)
    check(qkv, **resolve(options, sizes, backend.device))


@every_backend
@pytest.mark.parametrize("sizes", [(17, 8, 4), (33, 64, 2), (66, 40, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_exact_as_torchs_own_kernel(
    backend: Any, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    """The rule with scaled_dot_product_attention, which sums in float32, as PyTorch's op."""
    T, D, NH = sizes
    qkv = [torch.randn(1, NH, T, D, device=backend.device).to(dtype) for _ in range(3)]

    def torchs_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    results = [
        run(function, inputs)
        for function, inputs in (
            (ops.causal_attention, qkv),
            (torchs_kernel, qkv),
            (torchs_kernel, [t.double() for t in qkv]),
        )
    ]
    for actual, theirs, truth in zip(*results, strict=True):
        assert_accurate(actual, theirs, truth, dtype)


@native
@pytest.mark.parametrize("D", [1, 8, 40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("T", [1, 2, 17, 127, 129, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_torch(backend: Any, dtype: torch.dtype, T: int, D: int) -> None:
    qkv = make(Sizes(B=1, NH=2, NKV=1, Tq=T, Tk=T, D=D), dtype, backend.device)
    truth = exact(qkv)
    del truth[1]
    assert_all_accurate(run(ops.causal_attention, qkv), run(sdpa, qkv), truth)


LARGE = [
    Sizes(B=2, NH=2, NKV=1, Tq=300, Tk=300, D=64),
    Sizes(B=1, NH=2, NKV=2, Tq=129, Tk=257, D=40),
    Sizes(B=1, NH=1, NKV=1, Tq=200, Tk=1000, D=128),
    Sizes(B=1, NH=2, NKV=1, Tq=127, Tk=127, D=256),
]


@native
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("sizes", LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_at_size(
    backend: Any, dtype: torch.dtype, sizes: Sizes, options: dict[str, Any]
) -> None:
    options = {k: 100 if v == 9 else v for k, v in options.items()}
    qkv = make(sizes, dtype, backend.device)
    check(qkv, **resolve(options, sizes, backend.device))


@native
@pytest.mark.parametrize(("Tq", "Tk"), [(1, 40), (33, 100), (128, 129)])
def test_bottom_right_alignment_is_torchs(backend: Any, Tq: int, Tk: int) -> None:
    q, k, v = make(Sizes(Tq=Tq, Tk=Tk, D=16), torch.float32, backend.device)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(Tq, Tk))
    torch.testing.assert_close(ops.causal_attention(q, k, v), expected)


@native
@pytest.mark.parametrize("window", [1, 16, 47, 96, 97, 150])
def test_window_with_an_explicit_mask(backend: Any, window: int) -> None:
    qkv = make(Sizes(Tq=270, Tk=333, D=24), torch.float32, backend.device)
    truth = exact(qkv, window=window)
    del truth[1]
    actual = run(ops.causal_attention, qkv, window=window)
    assert_all_accurate(actual, run(sdpa, qkv, window=window), truth)


# ---------------------------------------------------------------- packed sequences, padding


PACKED = {
    "one": [0, 17],
    "three": [0, 5, 6, 17],
    "empty-ones": [0, 0, 9, 9, 17, 17],
    "gaps-at-the-ends": [2, 8, 15],
    "none": [0],
}


@every_backend
@pytest.mark.parametrize("cu_seqlens", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"dropout": 0.3}], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_packed(
    backend: Any, cu_seqlens: list[int], options: dict[str, Any], index: torch.dtype
) -> None:
    sizes = Sizes(B=1, NH=4, NKV=2)
    options = resolve({**options, "cu_seqlens": cu_seqlens}, sizes, backend.device)
    options["cu_seqlens"] = options["cu_seqlens"].to(index)
    check(make(sizes, torch.float32, backend.device), **options)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("D", [6, 12, 20, 40, 64, 80])
def test_packed_with_ends_anywhere(backend: Any, dtype: torch.dtype, D: int) -> None:
    # Sequences end in the middle of any tile, whose height depends on D.
    for seed in range(6):
        lengths = torch.randint(1, 40, (12,), generator=torch.Generator().manual_seed(seed))
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        T = int(starts[-1])
        qkv = make(Sizes(B=1, NH=2, NKV=1, Tq=T, Tk=T, D=D), dtype, backend.device)
        check(qkv, cu_seqlens=starts.to(backend.device), window=9 if seed % 2 else None)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 20])
def test_packed_is_each_sequence_alone(
    backend: Any, dtype: torch.dtype, window: int | None
) -> None:
    lengths = [3, 130, 1, 97, 64]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = make(Sizes(B=1, NKV=1, Tq=295, Tk=295, D=32), dtype, backend.device)
    whole = run(ours, (q, k, v), cu_seqlens=starts.to(backend.device), window=window)
    truth = exact((q, k, v), cu_seqlens=starts.to(backend.device), window=window)
    theirs = torchs((q, k, v), cu_seqlens=starts.to(backend.device), window=window)
    assert_all_accurate(whole, theirs, truth)
    for start, length in zip(starts.tolist(), lengths, strict=False):
        part = slice(start, start + length)
        out = ops.causal_attention(q[:, :, part], k[:, :, part], v[:, :, part], window=window)
        if backend.name == "cpu" and _C.cpu_isa() == "avx512_bf16" and length < 64:
            # Alone it is multiplied as floats (docs/math/attention.md).
            assert_accurate(out, theirs[0][:, :, part], truth[0][:, :, part], dtype)
        else:
            torch.testing.assert_close(whole[0][:, :, part], out)


@every_backend
@pytest.mark.parametrize("filler", [torch.nan, torch.inf, 1e30])
def test_padding_is_never_read(backend: Any, filler: float) -> None:
    sizes = Sizes(B=3, NH=2, NKV=1, Tq=13, Tk=17)
    qkv = make(sizes, torch.float32, backend.device)
    lengths = torch.tensor([17, 9, 0], device=backend.device)
    expected = run(ours, qkv, lengths=lengths)
    padded = torch.arange(17, device=backend.device) >= lengths[:, None]  # [B, Tk]
    q, k, v = (t.masked_fill(padded[:, None, -t.shape[2] :, None], filler) for t in qkv)
    for actual, wanted in zip(run(ours, (q, k, v), lengths=lengths), expected, strict=True):
        assert torch.equal(actual, wanted)


@native
@pytest.mark.parametrize("length", [1, 50, 96, 150])
def test_a_row_does_not_depend_on_its_padding(backend: Any, length: int) -> None:
    """Not one bit of it."""
    q, k, v = make(Sizes(B=1, Tq=200, Tk=200, D=64), torch.float32, backend.device)
    lengths = torch.tensor([length], device=backend.device)
    padded = ops.causal_attention(q, k, v, lengths=lengths)
    alone = ops.causal_attention(*(t[:, :, :length] for t in (q, k, v)))
    assert torch.equal(padded[:, :, :length], alone)
    assert (padded[:, :, length:] == 0).all()


# ---------------------------------------------------------------- layouts


VIEWS = {
    "heads-inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every-second-position": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "every-second-column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "columns-first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one-of-qkv": lambda x: torch.stack([x, x, x], 3)[:, :, :, 1],
    "expanded-batch": lambda x: x[:1].expand(x.shape[0], -1, -1, -1),
    "odd-offset": lambda x: torch.cat([x, x], 3)[..., 3 : 3 + x.shape[3]],
}


@every_backend
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(backend: Any, dtype: torch.dtype, view: Any) -> None:
    qkv = [view(t) for t in make(Sizes(), dtype, backend.device)]
    function = lambda q, k, v: ours(view(q), view(k), view(v))  # noqa: E731
    expected = run(function, [t.contiguous() for t in make(Sizes(), dtype, backend.device)])
    direct = ours(*qkv)
    contiguous = ours(*(t.contiguous() for t in qkv))
    assert torch.equal(direct[0], contiguous[0])
    assert torch.equal(direct[1], contiguous[1])
    assert all(torch.isfinite(t).all() for t in expected)


@every_backend
def test_strided_gradient_of_the_output(backend: Any) -> None:
    qkv = [t.requires_grad_() for t in make(Sizes(), torch.float32, backend.device)]
    out = ops.causal_attention(*qkv)
    upstream = torch.randn(17, 2, 2, 8, device=backend.device).permute(1, 2, 0, 3)
    grads = torch.autograd.grad(out, qkv, upstream, retain_graph=True)
    expected = torch.autograd.grad(out, qkv, upstream.contiguous(), retain_graph=True)
    ones = torch.ones((), device=backend.device).expand_as(out)
    broadcast = torch.autograd.grad(out, qkv, ones, retain_graph=True)
    for grad, wanted in zip(grads, expected, strict=True):
        assert torch.equal(grad, wanted)
    for grad, wanted in zip(broadcast, torch.autograd.grad(out.sum(), qkv), strict=False):
        assert torch.equal(grad, wanted)


@every_backend
def test_results_join_their_heads_without_a_copy(backend: Any) -> None:
    qkv = [t.requires_grad_() for t in make(Sizes(NKV=1), torch.float32, backend.device)]
    out = ops.causal_attention(*qkv)
    grads = torch.autograd.grad(out.sum(), qkv)
    assert out.transpose(1, 2).is_contiguous()
    assert all(grad.transpose(1, 2).is_contiguous() for grad in grads)


@every_backend
@pytest.mark.parametrize(
    "sizes", [Sizes(B=0), Sizes(Tq=0, Tk=0), Sizes(Tq=0, Tk=5), Sizes(NH=0, NKV=1)], ids=str
)
def test_nothing_to_do(backend: Any, sizes: Sizes) -> None:
    qkv = [t.requires_grad_() for t in make(sizes, torch.float32, backend.device)]
    out, lse = ops.causal_attention(*qkv, return_lse=True)
    assert out.shape == (sizes.B, sizes.NH, sizes.Tq, sizes.D)
    assert lse.shape == out.shape[:3]
    grads = torch.autograd.grad(out.sum() + lse.sum(), qkv)
    assert all((grad == 0).all() for grad in grads)


# ---------------------------------------------------------------- special values


@every_backend
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_outliers(backend: Any, dtype: torch.dtype, size: float) -> None:
    q, k, v = make(Sizes(D=16), dtype, backend.device)
    q[..., 3] = 100.0
    k[:, :, 5, 3] = size / 100 * 4  # scores of +-1e4 beside ordinary ones
    check((q, k, v))


@every_backend
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_offsets(backend: Any, offset: float) -> None:
    q, k, v = make(Sizes(D=16), torch.float32, backend.device)
    q[..., 0] = 100.0
    k[..., 0] = offset / 100 * 4
    check((q, k, v))


@every_backend
@pytest.mark.parametrize("value", [0.0, 3.0, 1e4])
def test_equal_scores(backend: Any, value: float) -> None:
    q, k, v = make(Sizes(D=4), torch.float32, backend.device)
    q = torch.full_like(q, value)
    k = torch.ones_like(k)
    out, lse = ours(q, k, v)
    count = torch.arange(1, 18, device=backend.device)
    torch.testing.assert_close(out, v.cumsum(2) / count[:, None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, (2 * value + count.log()).expand_as(lse))


@every_backend
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_keys_of_infinity_are_the_references(backend: Any, value: float) -> None:
    q, k, v = make(Sizes(B=1), torch.float32, backend.device)
    q = q.abs() + 0.1  # scores of +inf or -inf; mixed signs give NaN anywhere
    k[0, 0, 6] = value
    out, lse = ours(q, k, v)
    expected_out, expected_lse = reference.causal_attention(q, k, v)
    torch.testing.assert_close(out, expected_out, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, equal_nan=True)


@every_backend
def test_rows_that_see_nothing(backend: Any) -> None:
    qkv = make(Sizes(B=2, Tq=4, Tk=9), torch.float32, backend.device)
    lengths = torch.tensor([0, 7], device=backend.device)
    out, lse, dq, dk, dv = run(ours, qkv, lengths=lengths)
    nothing = torch.tensor([[True] * 4, [False, False, True, True]], device=backend.device)
    for t in (out, dq):
        assert torch.equal((t == 0).all(-1), nothing[:, None].expand(2, 2, 4))
    assert torch.equal(lse == -torch.inf, nothing[:, None].expand(2, 2, 4))
    unread = torch.arange(9, device=backend.device) >= lengths[:, None]
    for t in (dk, dv):
        assert torch.equal((t == 0).all(-1), unread[:, None].expand(2, 2, 9))


# ---------------------------------------------------------------- determinism


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [*LARGE, Sizes(B=1, NH=1, NKV=1, Tq=1500, Tk=1500)], ids=str)
def test_bits_do_not_depend_on_threads(backend: Any, dtype: torch.dtype, sizes: Sizes) -> None:
    qkv = make(sizes, dtype, "cpu")
    options = resolve({"dropout": 0.1, "alibi": "heads"}, sizes, "cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(ours, qkv, **options)
        torch.set_num_threads(5)
        five = run(ours, qkv, **options)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, five, strict=True):
        assert torch.equal(a, b)


@native
def test_bfloat16_gradients_of_keys_accumulate_in_float32(backend: Any) -> None:
    """Over 2000 queries: no further from the truth than rounding the result alone."""
    sizes = Sizes(B=1, NH=4, NKV=1, Tq=2000, Tk=2000, D=16)
    qkv = make(sizes, torch.bfloat16, backend.device)
    _, _, _, dk, dv = run(ours, qkv)
    _, _, _, exact_dk, exact_dv = exact(qkv)
    for grad, truth in ((dk, exact_dk), (dv, exact_dv)):
        error = (grad.double() - truth).abs()
        rounding = torch.finfo(torch.bfloat16).eps / 2 * truth.abs()
        # The weights are float32; dk also carries what rounding `out` did to each score's gradient.
        assert (error <= 1.5 * rounding + 2e-3 * truth.abs().max()).all()
