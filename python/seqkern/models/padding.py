"""Rows of different lengths in one batch: checks, and what stands in the padding.

Whatever the caller left in the padding is replaced before anything is computed with it, so that no
result can depend on it, NaN and ids outside the vocabulary included.
"""

import torch
from torch import Tensor

from seqkern.errors import check_tensor, require

_INTEGERS = (torch.int64, torch.int32)


def check_lengths(
    lengths: Tensor | None, x: Tensor, name: str = "lengths", least: int = 1
) -> Tensor:
    """The lengths int64 [B] of x [B, T, ...]; None stands for T everywhere.

    Raises:
        UserError: not integers [B], or on the CPU a length outside [least, T].
    """
    check_tensor("the batch", x)
    require(x.dim() >= 2, f"the batch must be [B, T, ...], got {list(x.shape)}")
    B, T = x.shape[:2]
    require(B >= 1 and least <= T, f"the batch must hold at least one element, got {list(x.shape)}")
    if lengths is None:
        return torch.full((B,), T, device=x.device)
    check_tensor(name, lengths)
    require(
        lengths.shape == (B,) and lengths.dtype in _INTEGERS,
        f"{name} must be int64 or int32 [{B}], got {lengths.dtype} {list(lengths.shape)}",
    )
    lengths = lengths.to(x.device, torch.int64)
    if _readable(lengths):
        low, high = (int(bound) for bound in torch.aminmax(lengths))
        require(
            low >= least and high <= T,
            f"{name} must be in [{least}, {T}], got {low if low < least else high}",
        )
    return lengths


def valid_steps(lengths: Tensor, T: int) -> Tensor:
    """Bool [B, T]: which elements exist."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def clean_tokens(tokens: Tensor, valid: Tensor, size: int, name: str = "tokens") -> Tensor:
    """Tokens [B, T] as int64 with 0 in the padding.

    Raises:
        UserError: not integers, or on the CPU one outside [0, size) that is not padding.
    """
    require(
        tokens.dim() == 2 and tokens.dtype in _INTEGERS,
        f"{name} must be int64 or int32 [B, T], got {tokens.dtype} {list(tokens.shape)}",
    )
    tokens = torch.where(valid, tokens.long(), 0)
    check_range(tokens, size, name)
    return tokens


def check_range(values: Tensor, size: int, name: str) -> None:
    """Raise `UserError` for integers outside [0, size), where looking costs nothing."""
    if values.numel() and _readable(values):
        low, high = (int(bound) for bound in torch.aminmax(values))
        require(
            low >= 0 and high < size,
            f"{name} must be in [0, {size}), got {low if low < 0 else high}",
        )


def zero_padding(x: Tensor, valid: Tensor) -> Tensor:
    """X [B, T, C] with zeros in the padding, NaN and infinities there included."""
    return torch.where(valid[..., None], x, 0.0)


def _readable(x: Tensor) -> bool:
    """Whether looking at the values costs nothing: on a GPU it would stall the stream."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
