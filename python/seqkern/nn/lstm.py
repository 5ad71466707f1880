"""`torch.nn.LSTM` and `torch.nn.LSTMCell` on seqkern's kernels."""

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
from seqkern.ops.lstm_cell import step

State = tuple[Tensor, Tensor]


class LSTM(StandsForTorchs, torch.nn.LSTM):
    """`torch.nn.LSTM`: same constructor, same state_dict, same results, another forward.

    Formula, dtypes and errors: `seqkern.ops.lstm`. Beyond torch: `lengths`, `return_cells` and
    `embedding` of `forward`, gradients in eval mode, second derivatives.

    Args:
        input_size: width of the input.
        hidden_size: H.
        num_layers: layers, each reading the output of the one before.
        bias: whether there are b_ih and b_hh.
        batch_first: input and output are [B, T, ...] instead of [T, B, ...].
        dropout: on the output of every layer but the last.
        bidirectional: a second recurrence from the last token to the first.
        proj_size: P, width of a projection of h; 0 for none.
        device, dtype: of the parameters.

    Example:
        >>> lstm = seqkern.nn.LSTM(5, 8, num_layers=2, batch_first=True)
        >>> x = torch.randn(3, 7, 5)
        >>> output, (h, c) = lstm(x, lengths=torch.tensor([7, 2, 4]))
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
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        return_cells: bool = False,
        embedding: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Run the layers.

        Args:
            input: [T, B, I], [B, T, I] with `batch_first`, [T, I], or a PackedSequence.
            hx: h [layers * directions, B, P] and c [layers * directions, B, H]; None for zeros.
            lengths: [B] steps of each row, int64 or int32, in any order, in place of packing. The
                output is zero at later times.
            return_cells: return also c of every step.
            embedding: [V, I]; the input is then tokens, int64 or int32, with no last dimension, and
                stands for `F.embedding(input, embedding)`. Where there are twice as many
                tokens as rows, W_ih x_t is made once per row and looked up, which saves up to half
                of the layer's products. (An `nn.Embedding` with `padding_idx`, `max_norm`,
                `scale_grad_by_freq` or hooks is more than its weight: look up first.)

        Returns:
            output, [T, B, directions * P] in the layout of the input, and (h_n, c_n) in that of
            `hx`; with `return_cells` also c [layers * directions, T, B, H], its last three
            dimensions in the layout of the input. Autocast on the CPU leaves c_n, and of a
            PackedSequence without `proj_size` all, in the dtype of `hx`, or of the input, if it is
            wider, as torch does.
        """
        call = recurrent.prepare(self, input, hx, lengths, embedding)
        before = call.states()
        cells: list[Tensor] = []

        def direction(x: Tensor, n: int, weights: list[Tensor | None]) -> tuple[Tensor, Any]:
            w_ih, w_hh, b_ih, b_hh, w_hr = weights
            w_ih = call.input_weight(x, w_ih)
            state = None if before is None else before[n]
            run: Any = ops.lstm
            output, last, *more = run(
                *(x, state, w_ih, w_hh, b_ih, b_hh, w_hr),
                lengths=call.lengths,
                reverse=self.bidirectional and n % 2 == 1,
                return_cells=return_cells,
            )
            cells.extend(more)
            return output, last

        output, states = recurrent.run_layers(self, call, direction)
        # Of one layer, too, no views: scripts cut the graph by h.detach_().
        h_n = torch.stack([h for h, _ in states])
        c_n = torch.stack([c for _, c in states])
        if call.packed is not None or self.proj_size:  # torch's own steps, which carry c along
            like = hx[1] if hx is not None else call.given
            c_n = as_torchs_state(c_n, like)
            if not self.proj_size:
                output, h_n = as_torchs_state(output, like), as_torchs_state(h_n, like)
        result = (call.restore(output), (call.restore_state(h_n), call.restore_state(c_n)))
        if not return_cells:
            return result
        restored = [call.restore(c) for c in cells]  # large: of one layer no copy
        return (*result, restored[0].unsqueeze(0) if len(restored) == 1 else torch.stack(restored))


class LSTMCell(_cell.KeepsPacked, StandsForTorchs, torch.nn.LSTMCell):
    """`torch.nn.LSTMCell`: same constructor, same state_dict, same results, another forward.

    Formula, dtypes and errors: `seqkern.ops.lstm_cell`. Beyond torch: `keep_packed`.

    Args:
        input_size: width of the input.
        hidden_size: H.
        bias: whether there are b_ih and b_hh.
        device, dtype: of the parameters.

    Example:
        >>> cell = seqkern.nn.LSTMCell(5, 8)
        >>> h, c = cell(torch.randn(3, 5))
    """

    @taken_whole
    @checked(diagnosis=_cell.diagnosis)
    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """One step: input [B, I] or [I], hx (h, c) each [B, H] or [H]; None for zeros."""
        x, state, weights, packed = _cell.prepare(self, input, hx)
        h, c = step(x, (state[0], state[1]), weights, packed)
        before = input if hx is None else hx[1]
        h, c = as_torchs_state(h, before), as_torchs_state(c, before)
        return (h, c) if input.dim() == 2 else (h.squeeze(0), c.squeeze(0))
