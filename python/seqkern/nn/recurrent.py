"""What the recurrent modules share: layouts of input and state, layers and directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from seqkern.nn._dynamo import is_exporting, left_out_of_graphs
from seqkern.ops._autocast import autocast, autocast_weights
from seqkern.ops._mistakes import describe
from seqkern.reference.inputs import valid_tokens


@dataclass(frozen=True)
class Call:
    """A module's input as the ops take it, and the way back."""

    input: Tensor  # [T, B, I], or with `embedding` tokens [T, B]
    state: tuple[Tensor, ...] | None  # each [layers * directions, B, ...]
    lengths: Tensor | None
    packed: PackedSequence | None
    host_lengths: Tensor | None  # of the packed sequence: packing again waits for no device
    transposed: bool
    unbatched: bool
    embedding: Tensor | None  # [V, I], of which tokens are the rows
    given: Tensor  # the input or the embedding before autocast

    def input_weight(self, x: Tensor, w_ih: Tensor | None) -> Tensor:
        """W_ih of x, or of tokens: what it makes of each row of the embedding, transposed."""
        assert w_ih is not None
        if x.is_floating_point():
            return w_ih
        assert self.embedding is not None
        return F.linear(self.embedding, w_ih).t()

    def states(self) -> list[tuple[Tensor, ...]] | None:
        """The states before the first step, of each layer and direction."""
        if self.state is None:
            return None
        return [tuple(s.select(0, n) for s in self.state) for n in range(self.state[0].shape[0])]

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Dropout of [T, B, ...], drawn as torch does: of a packed sequence for what is packed."""
        if self.packed is None:
            return F.dropout(x, p)
        assert self.host_lengths is not None
        inner = _packed(x, self.host_lengths, self.packed)
        return _padded(PackedSequence(F.dropout(inner.data, p), inner.batch_sizes))[0]

    def restore(self, output: Tensor) -> Any:
        """[T, B, ...] in the layout of the module's input."""
        if self.packed is not None:
            assert self.host_lengths is not None
            return _packed(output, self.host_lengths, self.packed)
        if self.unbatched:
            return output.squeeze(1)
        return output.transpose(0, 1) if self.transposed else output

    def restore_state(self, state: Tensor) -> Tensor:
        """[layers * directions, B, ...] in the layout of the module's hx."""
        if self.packed is not None and self.packed.unsorted_indices is not None:
            return state.index_select(1, self.packed.unsorted_indices)
        return state.squeeze(1) if self.unbatched else state


# How long a packed sequence is, its values say, which a graph does not have.
@left_out_of_graphs
def _padded(packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """[T, B, I] and the lengths [B], on the CPU, of a packed sequence."""
    batch_sizes = packed.batch_sizes
    x, lengths = torch._VF._pad_packed_sequence(
        packed.data, batch_sizes, False, 0.0, batch_sizes.shape[0]
    )
    return x, lengths


@left_out_of_graphs
def _packed(output: Tensor, lengths: Tensor, packed: PackedSequence) -> PackedSequence:
    """The output [T, B, ...] as a packed sequence in the order of `packed`."""
    data, batch_sizes = torch._VF._pack_padded_sequence(output, lengths, False)
    return PackedSequence(data, batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def states_of(
    module: torch.nn.RNNBase | torch.nn.RNNCellBase, hx: Any
) -> tuple[Tensor, ...] | None:
    """`hx` as a tuple, of the type and number of tensors that torch's module takes."""
    if hx is None:
        return None
    name = type(module).__name__
    if isinstance(module, (torch.nn.LSTM, torch.nn.LSTMCell)):
        is_pair = isinstance(hx, (tuple, list)) and len(hx) == 2
        if is_pair and isinstance(hx[0], Tensor) and isinstance(hx[1], Tensor):
            return tuple(hx)
        error = TypeError if is_pair or not isinstance(hx, (tuple, list)) else ValueError
        given = ", ".join(map(describe, hx)) if is_pair else describe(hx)
        raise error(f"{name}: hx must be a pair (h, c) of tensors or None, got {given}")
    if not isinstance(hx, Tensor):
        raise TypeError(f"{name}: hx must be a tensor or None, got {describe(hx)}")
    return (hx,)


def prepare(
    module: torch.nn.RNNBase,
    input: Tensor | PackedSequence,
    hx: Any,
    lengths: Tensor | None,
    embedding: Tensor | None = None,
) -> Call:
    """Check and bring into [T, B, I], or tokens into [T, B], what a module was called with."""
    name = type(module).__name__
    features = 1 if embedding is None else 0
    packed: PackedSequence | None = None
    host_lengths: Tensor | None = None
    x: Tensor
    if isinstance(input, PackedSequence):
        packed = input
        if lengths is not None:
            raise ValueError(f"{name}: lengths must be None with a PackedSequence, got a tensor")
        x, host_lengths = _padded(packed)
        lengths = host_lengths.to(x.device)
    else:
        x = input
        if x.dim() not in (1 + features, 2 + features):
            raise ValueError(
                f"{name}: input must have {1 + features} or {2 + features} dimensions"
                f"{'' if features else ' with embedding'}, got {list(x.shape)}"
            )
    if embedding is not None:
        _check_tokens(module, x, embedding)
    elif not x.is_floating_point():
        raise ValueError(
            f"{name}: input must be floating point, or have an embedding, got {x.dtype}"
        )
    elif x.shape[-1] != module.input_size:
        raise ValueError(
            f"{name}: input must have {module.input_size} features in its last dimension, "
            f"got {list(x.shape)}"
        )
    unbatched = packed is None and x.dim() == 1 + features
    transposed = packed is None and module.batch_first and not unbatched
    if unbatched:
        if lengths is not None:
            raise ValueError(f"{name}: lengths must be None with unbatched input, got a tensor")
        x = x.unsqueeze(1)
    elif transposed:
        x = x.transpose(0, 1)
    states = states_of(module, hx)
    if states is not None:
        states = tuple(_state(module, s, i, x.shape[1], unbatched) for i, s in enumerate(states))
        if packed is not None and packed.sorted_indices is not None:
            states = tuple(s.index_select(1, packed.sorted_indices) for s in states)
        states = autocast(*states)
    given = x if embedding is None else embedding
    if embedding is not None and not _is_worth_a_table(x, embedding):
        x, embedding = F.embedding(valid_tokens(x, lengths), embedding), None
    if embedding is None:
        (x,) = autocast(x)
    else:
        (embedding,) = autocast_weights(embedding)
    return Call(
        *(x, states, lengths, packed, host_lengths),
        *(transposed, unbatched, embedding, given),
    )


def _check_tokens(module: torch.nn.RNNBase, tokens: Tensor, embedding: Tensor) -> None:
    name = type(module).__name__
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: input must be int64 or int32 with embedding, got {tokens.dtype}")
    if embedding.dim() != 2 or embedding.shape[1] != module.input_size:
        raise ValueError(
            f"{name}: embedding must be [V, {module.input_size}], got {list(embedding.shape)}"
        )
    weight = module.weight_ih_l0
    ours, theirs = autocast(weight, embedding)
    if ours.dtype != theirs.dtype:
        raise ValueError(
            f"{name}: embedding must be {weight.dtype} like the weights, got {embedding.dtype}"
        )


def mismatch(name: str, input: Tensor, weight: Tensor) -> Exception | None:
    """What an op says of its weights, where it is the input that is unlike all parameters."""
    if input.device != weight.device:
        there = f"on {weight.device} like the weights"
        return ValueError(f"{name}: input must be {there}, got one on {input.device}")
    x, w = autocast(input, weight)
    if x.is_floating_point() and x.dtype != w.dtype:
        return ValueError(f"{name}: input must be {w.dtype} like the weights, got {x.dtype}")
    return None


def diagnosis(
    error: Exception,
    self: torch.nn.RNNBase,
    input: Tensor | PackedSequence,
    lengths: Tensor | None = None,
    embedding: Tensor | None = None,
    **_: Any,
) -> Exception | None:
    """Features that do not go with the weights; or the token that is no row of the embedding: rows
    are looked up by torch or by the op of a layer, and each says so in its own words.
    """
    tokens = input.data if isinstance(input, PackedSequence) else input
    if embedding is None:
        return mismatch(type(self).__name__, tokens, parameters_of(self, ("weight_ih_l0",))[0])
    outside = isinstance(error, IndexError) or ": input must be in [" in str(error)
    if not outside or not tokens.is_cpu:
        return None
    wrong = (tokens < 0) | (tokens >= embedding.shape[0])
    if lengths is not None and tokens.dim() == 2:  # what is padding is not looked at
        times = torch.arange(tokens.shape[int(self.batch_first)])
        exists = times < lengths[:, None]  # [B, T]
        wrong &= exists if self.batch_first else exists.T
    places = wrong.nonzero().tolist()
    if not places:
        return None
    token = int(tokens[tuple(places[0])])
    return ValueError(
        f"{type(self).__name__}: input must be in [0, {embedding.shape[0]}), "
        f"got {token} at {places[0]}"
    )


def _is_worth_a_table(tokens: Tensor, embedding: Tensor) -> bool:
    """Whether multiplying the whole embedding by a weight is less work than the rows of tokens
    [T, B] are.

    A single step has a kernel of its own, and an exported program one path for all sizes.
    """
    if is_exporting() or tokens.shape[0] == 1:
        return False
    return 2 * embedding.shape[0] <= tokens.numel()


def _state(module: torch.nn.RNNBase, state: Tensor, index: int, B: int, unbatched: bool) -> Tensor:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    width = module.proj_size if index == 0 and module.proj_size else module.hidden_size
    expected = [rows, width] if unbatched else [rows, B, width]
    if list(state.shape) != expected:
        name = f"hx[{index}]" if isinstance(module, torch.nn.LSTM) else "hx"
        raise ValueError(
            f"{type(module).__name__}: {name} must be {expected}, got {list(state.shape)}"
        )
    return state.unsqueeze(1) if unbatched else state


def run_layers(
    module: torch.nn.RNNBase,
    call: Call,
    direction: Callable[[Tensor, int, list[Tensor | None]], tuple[Tensor, Any]],
) -> tuple[Tensor, list[Any]]:
    """The output of the last layer, and the last states of all layers and directions.

    `direction(x, n, weights)` runs recurrence n = layer * directions + direction on its
    w_ih, w_hh, b_ih, b_hh, w_hr.
    """
    directions = 2 if module.bidirectional else 1
    x, states = call.input, []
    for layer in range(module.num_layers):
        outputs = []
        for n in range(layer * directions, (layer + 1) * directions):
            output, state = direction(x, n, list(autocast_weights(*_weights(module, n))))
            outputs.append(output)
            states.append(state)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if layer + 1 < module.num_layers and module.dropout > 0 and module.training:
            x = call.drop(x, module.dropout)
    return x, states


def _weights(module: torch.nn.RNNBase, n: int) -> tuple[Tensor | None, ...]:
    """w_ih, w_hh, b_ih, b_hh and w_hr of recurrence n."""
    found = parameters_of(module, module._all_weights[n])
    products, biases = found[:2], found[2:4] if module.bias else (None, None)
    return *products, *biases, found[-1] if module.proj_size else None


def parameters_of(module: torch.nn.Module, names: Any) -> tuple[Any, ...]:
    """Parameters by name: from the dictionary, which takes less time than attributes do."""
    own = module._parameters
    if not torch.compiler.is_compiling():
        try:
            return tuple([own[name] for name in names])
        except KeyError:  # one that is made anew for each call
            pass
    return tuple([getattr(module, name) for name in names])


def run_hidden(
    module: torch.nn.RNNBase,
    op: Callable[..., tuple[Tensor, Tensor]],
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    lengths: Tensor | None,
    embedding: Tensor | None,
) -> tuple[Any, Tensor]:
    """The forward of a module whose state is h alone, by the op of one layer and direction."""
    call = prepare(module, input, hx, lengths, embedding)
    before = call.states()

    def direction(x: Tensor, n: int, weights: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        w_ih, *others = weights[:4]
        h0 = None if before is None else before[n][0]
        reverse = module.bidirectional and n % 2 == 1
        w_ih = call.input_weight(x, w_ih)
        return op(x, h0, w_ih, *others, lengths=call.lengths, reverse=reverse)

    output, states = run_layers(module, call, direction)
    return call.restore(output), call.restore_state(torch.stack(states))
