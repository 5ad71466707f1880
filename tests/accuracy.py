"""The accuracy rule: an op may err at most twice as much as PyTorch's own in the same dtype, both
measured against the float64 reference, plus a tiny allowance."""

from __future__ import annotations

import torch
from torch import Tensor

#: A result PyTorch happens to get exactly right leaves no room; this many units in the last place
#: are always allowed. float64 gets more: the reference is no more precise than what it judges.
ULPS = {torch.float32: 4, torch.float64: 16, torch.bfloat16: 1, torch.float16: 1}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Largest error, relative to the largest exact value."""
    scale = exact.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((actual.double() - exact.double()).abs().max() / scale).item()


def assert_accurate(actual: Tensor, torchs: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """`actual` (ours) is at most twice as far from `exact` as `torchs`."""
    assert actual.shape == exact.shape == torchs.shape
    actual, torchs, exact = (t.detach().cpu() for t in (actual, torchs, exact))
    assert torch.isfinite(actual).all()
    if exact.numel() == 0:
        return
    ours, theirs = relative_error(actual, exact), relative_error(torchs, exact)
    allowed = 2 * theirs + ULPS[dtype] * torch.finfo(dtype).eps
    assert ours <= allowed, f"error {ours:.3g}, torch's {theirs:.3g}, allowed {allowed:.3g}"
