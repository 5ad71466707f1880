"""The LSTM in plain PyTorch: one step, and one direction of one layer over a sequence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from seqkern.reference.inputs import input_product, without_absent_state, without_padding


def lstm_cell(
    input: Tensor,
    state: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step: input [B, I], state (h [B, H], c [B, H]) to the next (h, c)."""
    return _step(F.linear(input, w_ih, b_ih), *state, w_hh, b_hh)


def _step(
    from_input: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    i, f, g, o = (from_input + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def lstm(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [T, B, P], h_n [B, P], c_n [B, H] and c [T, B, H], as `seqkern.ops.lstm` defines them
    for input [T, B, I], or tokens [T, B].

    Times t >= lengths[b] leave the state of row b as it is, which is also what lets a reversed row
    start at its own last token.
    """
    T, B = input.shape[:2]
    H = w_hh.shape[0] // 4
    input = without_padding(input, lengths)
    h = w_hh.new_zeros(B, w_hh.shape[1]) if h0 is None else h0
    c = w_hh.new_zeros(B, H) if c0 is None else c0
    before = (h, c)
    h, c = (without_absent_state(s, lengths) for s in before)
    outputs: list[Tensor] = [h] * T
    cells: list[Tensor] = [c] * T
    for t in reversed(range(T)) if reverse else range(T):
        h_t, c_t = _step(input_product(input[t], w_ih, b_ih), h, c, w_hh, b_hh)
        if w_hr is not None:
            h_t = F.linear(h_t, w_hr)
        if lengths is None:
            h, c = h_t, c_t
            outputs[t], cells[t] = h, c
        else:
            valid = (lengths > t).unsqueeze(-1)  # [B, 1]
            h, c = torch.where(valid, h_t, h), torch.where(valid, c_t, c)
            outputs[t], cells[t] = torch.where(valid, h, 0.0), torch.where(valid, c, 0.0)
    if lengths is not None:
        has_steps = (lengths > 0).unsqueeze(-1)
        h, c = (torch.where(has_steps, s, b) for s, b in zip((h, c), before, strict=True))
    if T == 0:
        return w_hh.new_zeros(0, B, h.shape[1]), h, c, w_hh.new_zeros(0, B, H)
    return torch.stack(outputs), h, c, torch.stack(cells)
