"""Dropout of attention: Philox's known answers, the mask, its statistics, its seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ops.attention_cases import BACKENDS, NATIVE, Sizes, make
from seqkern import ops
from seqkern.reference.attention import dropout_keep, philox

every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
native = pytest.mark.parametrize("backend", NATIVE, indirect=True)

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (ONES,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(key: int, counter: tuple[int, ...], words: tuple[int, ...]) -> None:
    """Those of the Random123 library, for the reference; the kernels have to draw its masks."""
    found = philox(torch.tensor(key), *(torch.tensor(c) for c in counter))
    assert tuple(int(word) for word in found) == words


def drawn_mask(sizes: Sizes, seed: Tensor, p: float, device: str, **options: Any) -> Tensor:
    """[B, NH, Tq, Tk]: which weights survived, read off an output whose values are unit rows."""
    assert sizes.Tk <= sizes.D
    q = torch.zeros(sizes.B, sizes.NH, sizes.Tq, sizes.D, device=device)
    k = torch.zeros(sizes.B, sizes.NKV, sizes.Tk, sizes.D, device=device)
    v = torch.eye(sizes.Tk, sizes.D, device=device).expand(sizes.B, sizes.NKV, -1, -1)
    out = ops.causal_attention(q, k, v, dropout_p=p, dropout_seed=seed, **options)
    return out[..., : sizes.Tk] != 0


@every_backend
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_the_mask_is_the_references(backend: Any, seed: int, p: float) -> None:
    sizes = Sizes(B=2, NH=3, NKV=1, Tq=14, Tk=19, D=19)
    key = torch.tensor([seed], device=backend.device)
    keep = dropout_keep(key, p, sizes.B, sizes.NH, sizes.Tq, sizes.Tk)
    causal = torch.ones(14, 19, dtype=torch.bool, device=backend.device).tril(5)
    assert torch.equal(drawn_mask(sizes, key, p, backend.device), keep & causal)


@native
def test_the_mask_at_size(backend: Any) -> None:
    sizes = Sizes(B=1, NH=2, NKV=1, Tq=250, Tk=250, D=250)
    key = torch.tensor([99], device=backend.device)
    keep = dropout_keep(key, 0.4, 1, 2, 250, 250).tril()
    assert torch.equal(drawn_mask(sizes, key, 0.4, backend.device), keep)


@native
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_share_of_dropped_weights(backend: Any, p: float) -> None:
    sizes = Sizes(B=4, NH=4, NKV=1, Tq=200, Tk=200, D=200)
    kept = drawn_mask(sizes, torch.tensor([5], device=backend.device), p, backend.device)
    drawn = 16 * 200 * 201 // 2
    deviation = (p * (1 - p) / drawn) ** 0.5
    assert abs(kept.sum().item() / drawn - (1 - p)) < 5 * deviation
    by_row = kept.sum(-1)[..., -1].double()  # the last query sees 200 keys
    assert by_row.std() > 0
    assert not torch.equal(kept[0, 0], kept[1, 0])
    assert not torch.equal(kept[0, 0], kept[0, 1])


@every_backend
def test_backward_draws_the_mask_of_forward(backend: Any) -> None:
    """With v a parameter alone, dv of sum(out) is the column sums of the dropped weights."""
    sizes = Sizes(B=1, NH=2, NKV=2, Tq=15, Tk=15, D=16)
    q, k, _ = make(sizes, torch.float32, backend.device)
    v = torch.eye(15, 16, device=backend.device).expand(1, 2, -1, -1).clone().requires_grad_()
    seed = torch.tensor([3], device=backend.device)
    out = ops.causal_attention(q, k, v, dropout_p=0.4, dropout_seed=seed)
    (dv,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(dv[..., 0], out.sum(2)[..., :15])


@every_backend
def test_torchs_generator_governs_the_seed(backend: Any) -> None:
    qkv = make(Sizes(), torch.float32, backend.device)
    draw = lambda: ops.causal_attention(*qkv, dropout_p=0.5)  # noqa: E731
    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    assert not torch.equal(first, second)


@every_backend
def test_the_mean_over_masks_is_no_dropout(backend: Any) -> None:
    qkv = make(Sizes(B=1, NH=1, NKV=1, Tq=5, Tk=5, D=2), torch.float32, backend.device)
    draws = 40 if backend.tiny else 4000
    seeds = torch.arange(draws, device=backend.device)
    mean = sum(ops.causal_attention(*qkv, dropout_p=0.3, dropout_seed=seed[None]) for seed in seeds)
    expected = ops.causal_attention(*qkv)
    torch.testing.assert_close(mean / draws, expected, rtol=0, atol=5 / draws**0.5)
