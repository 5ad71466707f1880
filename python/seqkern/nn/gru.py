"""`torch.nn.GRU` and `torch.nn.GRUCell` on seqkern's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkern import ops
from seqkern.nn import _cell, recurrent
from seqkern.nn._autocast import as_torchs_state
from seqkern.nn._dynamo import allow_recurrent_modules
from seqkern.nn._tools import StandsForTorchs, taken_whole
from seqkern.ops._mistakes import checked
from seqkern.ops.gru_cell import step


class GRU(StandsForTorchs, torch.nn.GRU):
    """`torch.nn.GRU`: same constructor, same state_dict, same results, another forward.

    Formula, dtypes and errors: `seqkern.ops.gru`. Beyond torch: `lengths` and `embedding` of
    `forward`, gradients in eval mode, second derivatives.

    Args:
        input_size: width of the input.
        hidden_size: H.
        num_layers: layers, each reading the output of the one before.
        bias: whether there are b_ih and b_hh.
        batch_first: input and output are [B, T, ...] instead of [T, B, ...].
        dropout: on the output of every layer but the last.
        bidirectional: a second recurrence from the last token to the first.
        device, dtype: of the parameters.

    Example:
        >>> gru = seqkern.nn.GRU(5, 8, num_layers=2, batch_first=True)
        >>> x = torch.randn(3, 7, 5)
        >>> output, h_n = gru(x, lengths=torch.tensor([7, 2, 4]))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See the class."""
        super().__init__(*args, **kwargs)
        allow_recurrent_modules()

    def flatten_parameters(self) -> None:
        """Nothing: the kernels read each weight where it is."""

    @taken_whole
    @checked(diagnosis=recurrent.diagnosis)
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """Run the layers.

        Args:
            input: [T, B, I], [B, T, I] with `batch_first`, [T, I], or a PackedSequence.
            hx: [layers * directions, B, H], or [layers * directions, H] with [T, I]; None: zeros.
            lengths: [B] steps of each row, int64 or int32, in any order, in place of packing. The
                output is zero at later times.
            embedding: [V, I], for tokens in place of the input: see `seqkern.nn.LSTM`.

        Returns:
            output, [T, B, directions * H] in the layout of the input, and h_n in that of `hx`.
            Autocast on the CPU leaves both in the dtype of `hx`, or of the input, if it is wider.
        """
        output, h_n = recurrent.run_hidden(self, ops.gru, input, hx, lengths, embedding)
        before = hx if hx is not None else embedding
        if before is None:
            before = input.data if isinstance(input, PackedSequence) else input
        if isinstance(output, PackedSequence):
            output = output._replace(data=as_torchs_state(output.data, before))
        else:
            output = as_torchs_state(output, before)
        return output, as_torchs_state(h_n, before)


class GRUCell(_cell.KeepsPacked, StandsForTorchs, torch.nn.GRUCell):
    """`torch.nn.GRUCell`: same constructor, same state_dict, same results, another forward.

    Formula, dtypes and errors: `seqkern.ops.gru_cell`. Beyond torch: `keep_packed`.

    Args:
        input_size: width of the input.
        hidden_size: H.
        bias: whether there are b_ih and b_hh.
        device, dtype: of the parameters.

    Example:
        >>> cell = seqkern.nn.GRUCell(5, 8)
        >>> h = cell(torch.randn(3, 5))
    """

    @taken_whole
    @checked(diagnosis=_cell.diagnosis)
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step: input [B, I] or [I], hx [B, H] or [H]; None for zeros."""
        x, state, weights, packed = _cell.prepare(self, input, hx)
        h = as_torchs_state(step(x, state[0], weights, packed), input if hx is None else hx)
        return h if input.dim() == 2 else h.squeeze(0)
