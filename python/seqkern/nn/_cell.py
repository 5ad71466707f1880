"""What the modules of one step share: kept copies of weights, and the layout of their calls."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from seqkern.nn import recurrent
from seqkern.ops._autocast import autocast, autocast_weights, is_casting
from seqkern.ops._packed_weights import PackedWeights

Cell = TypeVar("Cell", bound="KeepsPacked")

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class KeepsPacked:
    """A cell that may keep its weights packed."""

    _packed: PackedWeights | None = None  # also of modules whose class became this one

    def keep_packed(self: Cell, keep: bool = True) -> Cell:
        """Whether steps on the CPU share a packed copy of the weights, which is not the default.

        A step reads the weights in an order of its own. Where many steps follow one another with
        the same weights, a copy in that order saves each of them the packing; it takes the memory
        of the weights once more (for 16-bit ones on processors without such products, twice).
        Results may differ in rounding. In float32 below some 12 rows the copy is not used, and
        looking whether it is current costs a few microseconds.

        The copy is made anew after a step of any optimizer, and when a weight is replaced, moved,
        or changed in place in any way that autograd counts: by `load_state_dict`, or under
        `no_grad`. What is written through `weight.data`, or by another process into shared memory,
        nobody counts: call this again afterwards, which drops the copy.

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


def diagnosis(
    error: Exception, self: torch.nn.RNNCellBase, input: Tensor, **_: Any
) -> Exception | None:
    """An input that does not go with the weights."""
    return recurrent.mismatch(type(self).__name__, input, self.weight_ih)


def prepare(
    module: torch.nn.RNNCellBase, input: Tensor, hx: Any
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...], Tensor | None]:
    """What a cell was called with, as its op takes it: the input [B, I], the states [B, H], the
    weights and biases, and the copy of the weights, if one is kept.
    """
    dims = input.dim()
    if dims not in (1, 2):
        name = type(module).__name__
        raise ValueError(f"{name}: input must be [B, I] or [I], got {list(input.shape)}")
    states = recurrent.states_of(module, hx)
    if states is not None:
        _check_dims(module, states, dims)
    x = input if dims == 2 else input.unsqueeze(0)
    parameters = weights = recurrent.parameters_of(module, _NAMES)
    if is_casting(x):
        (x,) = autocast(x)
        weights = autocast_weights(*parameters)
        states = None if states is None else autocast(*states)
    if states is None:
        zeros = x.new_zeros(x.shape[0], module.hidden_size)
        states = (zeros,) * (2 if isinstance(module, torch.nn.LSTMCell) else 1)
    elif dims == 1:
        states = tuple(s.unsqueeze(0) for s in states)
    packed = None
    # seqkern.accelerate calls this on torch's module, which has none.
    kept = module.__dict__.get("_packed")
    # Not of what functional_call or a parametrization made for this call.
    if kept and all(type(w) is torch.nn.Parameter for w in parameters[:2]):
        packed = kept.of(*weights[:2])
    return x, states, weights, packed


def _check_dims(module: torch.nn.RNNCellBase, states: tuple[Tensor, ...], dims: int) -> None:
    for s in states:
        if s.dim() != dims:
            shapes = [list(s.shape) for s in states]
            raise ValueError(
                f"{type(module).__name__}: hx must have {dims} dimensions like input, "
                f"got {shapes if len(shapes) > 1 else shapes[0]}"
            )
