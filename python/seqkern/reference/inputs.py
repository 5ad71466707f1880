"""What a recurrent layer reads: vectors, or tokens that stand for one-hot vectors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def input_product(input: Tensor, w_ih: Tensor, b_ih: Tensor | None) -> Tensor:
    """w_ih x + b_ih for x [..., I], or for the one-hot vectors of tokens [...]."""
    if input.is_floating_point():
        return F.linear(input, w_ih, b_ih)
    columns = F.embedding(input, w_ih.t())
    return columns if b_ih is None else columns + b_ih


def valid_tokens(input: Tensor, lengths: Tensor | None) -> Tensor:
    """The input; if tokens [T, B], then 0 at times t >= lengths[b], where there may be none."""
    return input if input.is_floating_point() else without_padding(input, lengths)


def without_padding(input: Tensor, lengths: Tensor | None) -> Tensor:
    """The input, [T, B, I] or tokens [T, B], with 0 at times t >= lengths[b].

    Before anything is computed with it: results can be masked afterwards, but their gradients are
    products of zero with what was there, NaN perhaps.
    """
    if lengths is None:
        return input
    times = torch.arange(input.shape[0], device=input.device).unsqueeze(-1)  # [T, 1]
    padding = times >= lengths  # [T, B]
    return input.masked_fill(padding.unsqueeze(-1) if input.dim() == 3 else padding, 0)


def without_absent_state(state: Tensor, lengths: Tensor | None) -> Tensor:
    """The state [B, H] before the first step, with 0 in rows that have no step."""
    if lengths is None:
        return state
    return state.masked_fill((lengths <= 0).unsqueeze(-1), 0)
