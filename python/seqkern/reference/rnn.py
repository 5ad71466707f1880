"""The RNN in plain PyTorch: one step, and one direction of one layer over a sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from seqkern.reference.inputs import input_product, without_absent_state, without_padding


def rnn_cell(
    input: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step: input [B, I], or tokens [B], and h [B, H] to the next h."""
    a = input_product(input, w_ih, b_ih) + F.linear(h, w_hh, b_hh)
    return torch.relu(a) if nonlinearity == "relu" else torch.tanh(a)


def rnn(
    input: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    nonlinearity: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """Output [T, B, H] and h_n [B, H], as `seqkern.ops.rnn` defines them."""

    def cell(x: Tensor, h: Tensor) -> Tensor:
        return rnn_cell(x, h, w_ih, w_hh, b_ih, b_hh, nonlinearity)

    h0 = w_hh.new_zeros(input.shape[1], w_hh.shape[1]) if h0 is None else h0
    return over_sequence(cell, input, h0, lengths, reverse)


def over_sequence(
    cell: Callable[[Tensor, Tensor], Tensor],
    input: Tensor,
    h: Tensor,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """`h = cell(input[t], h)` over all steps, for layers whose state is h alone.

    Times t >= lengths[b] leave the state of row b as it is, which is also what lets a reversed row
    start at its own last token.
    """
    T = input.shape[0]
    input = without_padding(input, lengths)
    before, h = h, without_absent_state(h, lengths)
    outputs: list[Tensor] = [h] * T
    for t in reversed(range(T)) if reverse else range(T):
        h_t = cell(input[t], h)
        if lengths is None:
            outputs[t] = h = h_t
        else:
            valid = (lengths > t).unsqueeze(-1)  # [B, 1]
            h = torch.where(valid, h_t, h)
            outputs[t] = torch.where(valid, h, 0.0)
    if lengths is not None:
        h = torch.where((lengths > 0).unsqueeze(-1), h, before)
    if T == 0:
        return h.new_zeros(0, *h.shape), h
    return torch.stack(outputs), h
