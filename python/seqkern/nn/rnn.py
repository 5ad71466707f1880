"""`torch.nn.RNN` and `torch.nn.RNNCell` on seqkern's kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkern import ops
from seqkern.nn import _cell, recurrent
from seqkern.nn._dynamo import allow_recurrent_modules
from seqkern.nn._tools import StandsForTorchs, taken_whole
from seqkern.ops._mistakes import checked
from seqkern.ops.rnn_cell import step


class RNN(StandsForTorchs, torch.nn.RNN):
    """`torch.nn.RNN`: same constructor, same state_dict, same results, another forward.

    Formula, dtypes and errors: `seqkern.ops.rnn`. Beyond torch: `lengths` and `embedding` of
    `forward`, gradients in eval mode, second derivatives.

    Args:
        input_size: width of the input.
        hidden_size: H.
        num_layers: layers, each reading the output of the one before.
        nonlinearity: "tanh" or "relu".
        bias: whether there are b_ih and b_hh.
        batch_first: input and output are [B, T, ...] instead of [T, B, ...].
        dropout: on the output of every layer but the last.
        bidirectional: a second recurrence from the last token to the first.
        device, dtype: of the parameters.

    Example:
        >>> rnn = seqkern.nn.RNN(5, 8, nonlinearity="relu", batch_first=True)
        >>> x = torch.randn(3, 7, 5)
        >>> output, h_n = rnn(x, lengths=torch.tensor([7, 2, 4]))
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
        """Run the layers; arguments and results as `seqkern.nn.GRU`'s."""
        op = partial(ops.rnn, nonlinearity=self.nonlinearity)
        return recurrent.run_hidden(self, op, input, hx, lengths, embedding)


class RNNCell(_cell.KeepsPacked, StandsForTorchs, torch.nn.RNNCell):
    """`torch.nn.RNNCell`: same constructor, same state_dict, same results, another forward.

    Formula, dtypes and errors: `seqkern.ops.rnn_cell`. Beyond torch: `keep_packed`.

    Args:
        input_size: width of the input.
        hidden_size: H.
        bias: whether there are b_ih and b_hh.
        nonlinearity: "tanh" or "relu".
        device, dtype: of the parameters.

    Example:
        >>> cell = seqkern.nn.RNNCell(5, 8, nonlinearity="relu")
        >>> h = cell(torch.randn(3, 5))
    """

    @taken_whole
    @checked(diagnosis=_cell.diagnosis)
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step: input [B, I] or [I], hx [B, H] or [H]; None for zeros."""
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"RNNCell: nonlinearity must be 'tanh' or 'relu', got {self.nonlinearity!r}"
            )
        x, state, weights, packed = _cell.prepare(self, input, hx)
        h = step(x, state[0], weights, packed, relu=self.nonlinearity == "relu")
        return h if input.dim() == 2 else h.squeeze(0)
