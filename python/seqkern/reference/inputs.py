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


def without_padding(input: Tensor, lengths: Tensor | None) -> Tensor:
    """The input; if tokens [T, B], then 0 at times t >= lengths[b], where there may be none."""
    if lengths is None or input.is_floating_point():
        return input
    times = torch.arange(input.shape[0], device=input.device).unsqueeze(-1)  # [T, 1]
    return input.masked_fill(times >= lengths, 0)
