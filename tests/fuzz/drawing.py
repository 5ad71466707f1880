"""Random calls: tensors of any layout, and the comparison of what ours and PyTorch make of them.

A case is drawn by hypothesis as numbers and words, which it can make smaller until a failure has
nothing in it that does not matter; tensors are made from a case's seed. What an op may be given
around its tensors (gaps between rows, the other half of a strided dimension) is NaN.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

#: Calls per test: few in every run of the tests, and always the same; `make fuzz` sets more.
EXAMPLES = int(os.environ.get("SEQKERN_FUZZ_EXAMPLES", "0"))

calls = settings(
    max_examples=EXAMPLES or 25,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

#: The tensors are the CPU's: on a GPU nothing of this has been tried.
on_backends = pytest.mark.parametrize("backend", ["cpu", "emu"], indirect=True)

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
LAYOUTS = st.sampled_from(
    ["contiguous", "offset", "gaps", "permuted", "step", "same rows", "same columns"]
)
SEEDS = st.integers(0, 2**31)
THREADS = st.integers(1, 3)


def sizes(*bounds: int, least: int = 1) -> st.SearchStrategy[int]:
    """A size up to the largest bound: as often below the first as between two of them."""
    ranges = zip((least, *bounds), bounds, strict=False)
    return st.one_of(*(st.integers(low, high) for low, high in ranges))


def accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class Values:
    """The tensors of one case."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Rounded to a case's dtype, so that every precision starts from the same numbers."""
        values = torch.randn(size, generator=self.random, dtype=torch.float64)
        return (values * scale).to(dtype)

    def integers(self, low: int, high: int, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, size, generator=self.random).to(dtype)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values of `t` (of its first row or column, for those of the same), lying as `layout`
    says."""
    if t.dim() == 0:
        return t
    if layout == "offset":
        junk = t.new_full((3,), torch.nan) if t.is_floating_point() else t.new_zeros(3)
        return torch.cat([junk, t.flatten()])[3:].view(t.shape)
    if layout == "gaps":
        wide = torch.nn.functional.pad(t, (2, 3), value=torch.nan if t.is_floating_point() else 0)
        return wide[..., 2 : 2 + t.shape[-1]]
    if layout == "permuted":
        dims = list(reversed(range(t.dim())))
        return t.permute(dims).contiguous().permute(dims)
    if layout == "step":
        junk = torch.full_like(t, torch.nan) if t.is_floating_point() else torch.zeros_like(t)
        return torch.stack([t, junk], -1)[..., 0]
    if layout in ("same rows", "same columns"):
        d = 0 if layout == "same rows" else t.dim() - 1
        return t.narrow(d, 0, min(1, t.shape[d])).expand(t.shape) if t.shape[d] else t
    return t.clone(memory_format=torch.contiguous_format)


def results(
    call: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    layouts: Sequence[str],
    wanted: Sequence[bool],
    upstream: Callable[[int, Tensor], Tensor | None],
) -> list[Tensor | None]:
    """Outputs of `call` on the tensors as they are laid out, then the gradients of those wanted."""
    given = [
        None if t is None else laid_out(t, layout).requires_grad_(w)
        for t, layout, w in zip(tensors, layouts, wanted, strict=True)
    ]
    found = call(*given)
    outputs = found if isinstance(found, tuple) else (found,)
    by = [t for t in given if t is not None and t.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(by)
    pairs = [(o, g) for i, o in enumerate(outputs) if (g := upstream(i, o)) is not None]
    pairs = [(o, g) for o, g in pairs if o.requires_grad]
    if by and pairs:
        grads = torch.autograd.grad(
            [o for o, _ in pairs], by, [g for _, g in pairs], allow_unused=True
        )
    return [*(o.detach() for o in outputs), *grads]


#: In units of the last place, of the largest value. What is looked for here are wrong numbers, in
#: results that may be of one element; tests/accuracy.py is the rule that kernels are held to.
SLACK = {torch.float32: 256, torch.float64: 4096, torch.bfloat16: 4, torch.float16: 4}


def compare(
    actual: Sequence[Tensor | None],
    torchs: Sequence[Tensor | None],
    exact: Sequence[Tensor | None],
    dtype: torch.dtype,
    floor: float = 0.2,
) -> None:
    """Each of `actual` is finite where `exact` is, and near it: within four times the error of
    PyTorch's and some units in the last place of the largest value (of `floor`, if that is more:
    what cancels has the errors of what it was made of)."""
    assert len(actual) == len(torchs) == len(exact)
    for number, (ours, theirs, truth) in enumerate(zip(actual, torchs, exact, strict=True)):
        if ours is None or theirs is None or truth is None:
            for t in (ours, theirs, truth):
                assert t is None or not t.any(), f"result {number}: a gradient for some only"
            continue
        assert ours.shape == truth.shape, f"result {number}: {ours.shape} for {truth.shape}"
        ours, theirs, truth = (t.cpu().double() for t in (ours, theirs, truth))
        finite = truth.isfinite()
        assert torch.equal(ours.isfinite(), finite), f"result {number}: not finite where it should"
        same = (ours == truth) | (ours.isnan() & truth.isnan())
        assert (same | finite).all(), f"result {number}: another infinity"
        if not finite.any():
            continue
        ours, theirs, truth = ours[finite], theirs[finite].nan_to_num(0.0), truth[finite]
        scale = max(truth.abs().max().item(), floor)
        error = (ours - truth).abs().max().item()
        allowed = 4 * min((theirs - truth).abs().max().item(), scale / 10)
        allowed += SLACK[dtype] * torch.finfo(dtype).eps * scale
        assert error <= allowed, f"result {number}: error {error:.3g}, allowed {allowed:.3g}"
