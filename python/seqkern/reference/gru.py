"""The GRU in plain PyTorch: one step, and one direction of one layer over a sequence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from seqkern.reference.inputs import input_product
from seqkern.reference.rnn import over_sequence


def gru_cell(
    input: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step: input [B, I], or tokens [B], and h [B, H] to the next h."""
    a_r, a_z, a_n = input_product(input, w_ih, b_ih).chunk(3, -1)
    u_r, u_z, u_n = F.linear(h, w_hh, b_hh).chunk(3, -1)
    r, z = torch.sigmoid(a_r + u_r), torch.sigmoid(a_z + u_z)
    n = torch.tanh(a_n + r * u_n)
    return n + z * (h - n)


def gru(
    input: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output [T, B, H] and h_n [B, H], as `seqkern.ops.gru` defines them."""

    def cell(x: Tensor, h: Tensor) -> Tensor:
        return gru_cell(x, h, w_ih, w_hh, b_ih, b_hh)

    h0 = w_hh.new_zeros(input.shape[1], w_hh.shape[1]) if h0 is None else h0
    return over_sequence(cell, input, h0, lengths, reverse)
