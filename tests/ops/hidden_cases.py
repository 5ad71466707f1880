"""The layers whose state is h alone: ours, PyTorch's and the reference as functions of the same
tensors (input, h0, w_ih, w_hh, b_ih, b_hh), to outputs (output, h_n)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from recurrent import flip, weights
from seqkern import ops, reference

CELLS = ["gru", "tanh", "relu"]
GATES = {"gru": 3, "tanh": 1, "relu": 1}
_THEIRS: dict[str, Any] = {"gru": torch.gru, "tanh": torch.rnn_tanh, "relu": torch.rnn_relu}


def make(
    cell: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    *,
    bias: bool = True,
    state: bool = True,
) -> list[Tensor | None]:
    """The tensors of a layer for shape (T, B, D, H)."""
    T, B, D, H = shape
    normal: Any = lambda *size: torch.randn(*size).to(device, dtype)  # noqa: E731
    h0 = normal(B, H) if state else None
    w_ih, w_hh, b_ih, b_hh, _ = weights(GATES[cell], D, H, dtype, device, bias=bias)
    if cell == "relu" and dtype.itemsize == 2 and b_ih is not None:
        # The derivative jumps at 0, where 16 bits may fall on either side, torch's or ours: each
        # unit is clearly on or clearly off.
        w_ih, w_hh, b_ih = w_ih / 4, w_hh / 4, b_ih.sign() * 4 + b_ih  # type: ignore[operator]
    return [normal(T, B, D), h0, w_ih, w_hh, b_ih, b_hh]


def ours(cell: str, **options: Any) -> Any:
    """The op; `options` are its keyword arguments."""

    def forward(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        if cell == "gru":
            return ops.gru(*tensors, **options)
        return ops.rnn(*tensors, nonlinearity=cell, **options)

    return forward


def exact(cell: str, reverse: bool = False, lengths: Tensor | None = None) -> Any:
    """The reference."""

    def forward(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        if cell == "gru":
            return reference.gru(*tensors, lengths, reverse)
        return reference.rnn(*tensors, lengths, reverse, cell)

    return forward


def theirs(cell: str, reverse: bool = False, lengths: Tensor | None = None) -> Any:
    """PyTorch's own over a flipped sequence, where the direction is reversed."""

    def forward(input: Tensor, h0: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        present = [w for w in parameters if w is not None]
        arguments = (present, len(present) == 4, 1, 0.0, True, False)
        if h0 is None:
            h0 = input.new_zeros(input.shape[1], parameters[1].shape[1])
        if lengths is None:
            x = input.flip(0) if reverse else input
            output, h = _THEIRS[cell](x, h0[None], *arguments, False)
            return output.flip(0) if reverse else output, h[0]
        x = flip(input, lengths) if reverse else input
        packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        state = h0[None].index_select(1, packed.sorted_indices)
        data, h = _THEIRS[cell](packed.data, packed.batch_sizes, state, *arguments)
        packed = packed._replace(data=data)
        output, _ = pad_packed_sequence(packed, total_length=input.shape[0])
        output = flip(output, lengths) if reverse else output
        return output, h.index_select(1, packed.unsorted_indices)[0]

    return forward
