"""`torch.nn.LSTM` and `torch.nn.LSTMCell` on seqkern's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkern import ops
from seqkern.nn import recurrent
from seqkern.nn._autocast import as_torchs_state
from seqkern.nn._dynamo import allow_recurrent_modules
from seqkern.ops._mistakes import checked
from seqkern.ops.lstm_cell import PackedWeights, step

State = tuple[Tensor, Tensor]


class LSTM(torch.nn.LSTM):
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
            dimensions in the layout of the input.
        """
        call = recurrent.prepare(self, input, hx, lengths, embedding)
        cells: list[Tensor] = []

        def direction(x: Tensor, n: int, weights: list[Tensor | None]) -> tuple[Tensor, Any]:
            w_ih, w_hh, b_ih, b_hh, w_hr = weights
            w_ih = call.input_weight(x, w_ih)
            state = None if call.state is None else (call.state[0][n], call.state[1][n])
            run: Any = ops.lstm
            output, last, *more = run(
                *(x, state, w_ih, w_hh, b_ih, b_hh, w_hr),
                lengths=call.lengths,
                reverse=self.bidirectional and n % 2 == 1,
                return_cells=return_cells,
            )
            cells.extend(more)
            return output, last

        output, states = recurrent.run_layers(self, call.input, direction)
        h_n = recurrent.stacked([h for h, _ in states])
        c_n = recurrent.stacked([c for _, c in states])
        result = (call.restore(output), (call.restore_state(h_n), call.restore_state(c_n)))
        if not return_cells:
            return result
        return (*result, recurrent.stacked([call.restore(c) for c in cells]))


class LSTMCell(torch.nn.LSTMCell):
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

    _packed: PackedWeights | None = None  # also of modules whose class became this one

    def keep_packed(self, keep: bool = True) -> LSTMCell:
        """Whether steps on the CPU share a packed copy of the weights, which is not the default.

        A step reads the weights in an order of its own. Where many steps follow one another with
        the same weights, a copy in that order saves each of them the packing; it takes the memory
        of the weights once more (for 16-bit ones on processors without such products, twice).
        Results may differ in rounding. In float32 below some 12 rows the copy is not used, and
        looking whether it is current costs a few microseconds.

        The copy is made anew after a step of any optimizer, and when a weight is replaced, moved,
        or changed in place in any way that autograd counts: by `load_state_dict`, or under
        `no_grad`. What is written through `weight.data`, nobody counts: call this again afterwards,
        which drops the copy.

        Returns:
            The module.
        """
        self._packed = PackedWeights() if keep else None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the copy, which is worth neither a file nor a second one."""
        state = self.__dict__.copy()
        if state.get("_packed") is not None:
            state["_packed"] = PackedWeights()
        return state

    @checked()
    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """One step: input [B, I] or [I], hx (h, c) each [B, H] or [H]; None for zeros."""
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: input must be [B, I] or [I], got {list(input.shape)}")
        states = recurrent.states_of(self, hx)
        if states is not None and any(s.dim() != input.dim() for s in states):
            raise ValueError(
                f"LSTMCell: hx must have {input.dim()} dimensions like input, "
                f"got {[list(s.shape) for s in states]}"
            )
        x = input if input.dim() == 2 else input.unsqueeze(0)
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        x, *rest = recurrent.autocast(x, *weights)
        if states is None:
            zeros = x.new_zeros(x.shape[0], self.hidden_size)
            state = (zeros, zeros)
        else:
            h, c = recurrent.autocast(*states)
            state = (h, c) if input.dim() == 2 else (h.unsqueeze(0), c.unsqueeze(0))
        packed = None
        kept = getattr(self, "_packed", None)  # seqkern.accelerate calls this on torch's module
        # Not of what autocast, functional_call or a parametrization made for this call.
        if kept and all(type(w) is torch.nn.Parameter for w in rest[:2]):
            packed = kept.of(*rest[:2])
        h, c = step(x, state, tuple(rest), packed)
        before = input if hx is None else hx[1]
        h, c = as_torchs_state(h, before), as_torchs_state(c, before)
        return (h, c) if input.dim() == 2 else (h.squeeze(0), c.squeeze(0))
