"""A cell's weights in the layout of its CPU kernel, kept from step to step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from seqkern.ops import _registry
from seqkern.ops._fakes import register_fake


class PackedWeights:
    """A copy of both weights in the layout of the CPU kernel, made anew when they change.

    A change is another tensor, other memory, another version of the same, or a step of any
    optimizer: autograd counts what is written in place, but neither what torch's fused optimizers
    write nor what is written through `.data`.
    """

    _optimizer_steps: int | None = None  # of the process; None: not counted yet

    def __init__(self) -> None:
        """No copy yet."""
        self._kept: tuple[Any, ...] | None = None
        if PackedWeights._optimizer_steps is None:
            PackedWeights._optimizer_steps = 0
            register_optimizer_step_post_hook(_count_optimizer_step)

    def of(self, w_ih: Tensor, w_hh: Tensor) -> Tensor | None:
        """The copy, or None where the kernel has no use for one."""
        if torch.compiler.is_compiling() or not w_ih.is_cpu:
            return None
        if w_ih.is_inference() or w_hh.is_inference():  # such tensors count no versions
            return None
        state = (
            *(w_ih.data_ptr(), w_ih._version, w_ih.dtype, w_ih.shape, w_ih.stride()),
            *(w_hh.data_ptr(), w_hh._version, w_hh.dtype, w_hh.shape, w_hh.stride()),
            *(torch.get_num_threads(), _registry.active, PackedWeights._optimizer_steps),
        )
        kept = self._kept
        if kept is None or kept[0] != state:
            sources = w_ih.detach(), w_hh.detach()
            packed = _registry.call(_registry.active.cell_pack, *sources)
            # The sources are kept so that nothing else comes to lie at their addresses.
            self._kept = kept = (state, packed, sources)
        return kept[1] if kept[1].numel() else None


def _count_optimizer_step(*_: Any) -> None:
    PackedWeights._optimizer_steps = (PackedWeights._optimizer_steps or 0) + 1


def _fake_pack(w_ih: Tensor, w_hh: Tensor) -> Tensor:
    # How many bytes, the processor's instruction set decides.
    size: Any = torch.library.get_ctx().new_dynamic_size()
    return w_ih.new_empty(size, dtype=torch.uint8)


@_registry.registration
def register(namespace: str) -> None:
    """Add the fake of the op of `namespace`."""
    register_fake(namespace, "cell_pack", _fake_pack)
