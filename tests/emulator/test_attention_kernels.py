"""What the small shapes of tests/ops do not reach in attention's CUDA kernels: several tiles of
each kind, every width, the kernels of older GPUs, and independence of the order of threads."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from ops.attention_cases import Sizes, make, ours, resolve, run
from ops.test_attention import check

HALF = [torch.float16, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("emulated")


#: None shorter than a tile of anything, nor a multiple of one.
TILES = Sizes(B=1, NH=1, NKV=1, Tq=139, Tk=139)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "negative-scale": {"scale": -0.1},
    "window": {"window": 70},
    "narrow-window": {"window": 3},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": "rows"},
    "dropout": {"dropout": 0.3},
    "lengths": {"lengths": True},
    "all": {"lengths": True, "alibi": "rows", "softcap": 2.0, "dropout": 0.2, "window": 77},
}


@pytest.mark.parametrize("D", [1, 8, 31, 40, 64, 80, 128, 250, 256])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_widths(dtype: torch.dtype, D: int) -> None:
    qkv = make(Sizes(**{**vars(TILES), "D": D}), dtype, "cpu")
    check(qkv)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("dtype", "D"), [(torch.float16, 64), (torch.bfloat16, 128), (torch.bfloat16, 200)], ids=str
)
def test_options_across_tiles(dtype: torch.dtype, D: int, options: dict[str, Any]) -> None:
    sizes = Sizes(B=2, NH=2, NKV=1, Tq=131, Tk=203, D=D)
    check(make(sizes, dtype, "cpu"), **resolve(options, sizes, "cpu"))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_options_across_tiles_without_tensor_cores(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    sizes = Sizes(B=2, NH=2, NKV=1, Tq=37, Tk=70, D=40)
    options = {k: 20 if k == "window" and v > 3 else v for k, v in options.items()}
    check(make(sizes, dtype, "cpu"), **resolve(options, sizes, "cpu"))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_older_gpus(older_gpu: None, dtype: torch.dtype, options: dict[str, Any]) -> None:
    sizes = Sizes(B=2, NH=2, NKV=1, Tq=5, Tk=35, D=24)
    check(make(sizes, dtype, "cpu"), **resolve(options, sizes, "cpu"))


#: Starts of every remainder by four, which is what one draw of dropout covers, empty sequences, and
#: tokens that belong to none.
STARTS = {"gaps": [2, 5, 5, 151, 190], "whole": [0, 131, 132, 134, 203]}


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("options", [{}, {"window": 33}, {"dropout": 0.3}], ids=str)
@pytest.mark.parametrize(("dtype", "D"), [(torch.bfloat16, 64), (torch.float32, 8)], ids=str)
def test_packed_across_tiles(
    dtype: torch.dtype, D: int, options: dict[str, Any], starts: list[int]
) -> None:
    sizes = Sizes(B=1, NH=2, NKV=1, Tq=203, Tk=203, D=D)
    check(make(sizes, dtype, "cpu"), **resolve({**options, "cu_seqlens": starts}, sizes, "cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_keys_beyond_the_window_are_not_read(dtype: torch.dtype) -> None:
    q, k, v = make(Sizes(B=1, NH=1, NKV=1, Tq=260, Tk=260, D=16), dtype, "cpu")
    expected, _ = ours(q, k, v, window=5)
    k[:, :, :60] = torch.nan
    v[:, :, :60] = torch.nan
    actual, _ = ours(q, k, v, window=5)
    assert torch.equal(actual[:, :, 200:], expected[:, :, 200:])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_padding_is_never_read(dtype: torch.dtype) -> None:
    sizes = Sizes(B=3, NH=2, NKV=1, Tq=13, Tk=140, D=24)
    qkv = make(sizes, dtype, "cpu")
    lengths = torch.tensor([140, 133, 70])
    expected = run(ours, qkv, lengths=lengths)
    padded = torch.arange(140) >= lengths[:, None]  # [B, Tk]
    q, k, v = (t.masked_fill(padded[:, None, -t.shape[2] :, None], torch.nan) for t in qkv)
    for actual, wanted in zip(run(ours, (q, k, v), lengths=lengths), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_one_key_gives_no_gradient_to_its_query(dtype: torch.dtype) -> None:
    """Not a rounding error either: out and v are the same bits."""
    q, k, v = (t.requires_grad_() for t in make(Sizes(Tq=1, Tk=1, D=80), dtype, "cpu"))
    out, _ = ours(q, k, v)
    assert torch.equal(out, v)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert (dq == 0).all()
    assert (dk == 0).all()
    assert (dv != 0).all()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("D", [8, 20, 33])
def test_rows_of_any_alignment(D: int, offset: int) -> None:
    """The same bits from rows that 16-byte copies can take and from others."""
    qkv = make(Sizes(Tq=17, Tk=21, D=D), torch.bfloat16, "cpu")
    aligned = [torch.zeros(*t.shape[:3], 40, dtype=t.dtype)[..., :D].copy_(t) for t in qkv]
    other = [torch.zeros(*t.shape[:3], 43, dtype=t.dtype) for t in qkv]
    other = [o[..., offset : offset + D].copy_(t) for o, t in zip(other, qkv, strict=True)]
    for a, b in zip(ours(*aligned), ours(*other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("odd", ["q", "k", "v", "dout"])
def test_whole_tiles_beside_rows_of_any_alignment(odd: str) -> None:
    """Of two tensors that are walked together, one alone cannot be copied in 16-byte chunks."""
    sizes = Sizes(B=1, NH=2, NKV=1, Tq=139, Tk=139, D=64)
    tensors = dict(zip("qkv", make(sizes, torch.bfloat16, "cpu"), strict=True))
    tensors["dout"] = torch.randn_like(tensors["q"])

    def results() -> list[torch.Tensor]:
        qkv = [tensors[name].detach().requires_grad_() for name in "qkv"]
        out, lse = ours(*qkv)
        return [out, lse, *torch.autograd.grad(out, qkv, tensors["dout"])]

    expected = results()
    aligned = tensors[odd]
    tensors[odd] = torch.zeros(*aligned.shape[:3], 67, dtype=aligned.dtype)[..., 1:65]
    tensors[odd].copy_(aligned)
    for actual, wanted in zip(results(), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_every_order(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    sizes = Sizes(B=2, NH=2, NKV=1, Tq=40, Tk=75, D=16)
    qkv = make(sizes, dtype, "cpu")
    options = resolve({"dropout": 0.2, "lengths": True}, sizes, "cpu")
    results = []
    for seed in range(3):
        library.seqkern_emu_set_seed(seed)
        results.append(run(ours, qkv, **options))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
