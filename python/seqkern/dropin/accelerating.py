"""`accelerate`: calls of torch's functions go to our kernels inside a block, or from now on."""

from __future__ import annotations

import functools
import threading
from contextlib import ContextDecorator
from types import TracebackType
from typing import Any

import torch

from seqkern.dropin import kept, routes
from seqkern.dropin.compiling import keep_out_of_tables
from seqkern.nn._dynamo import allow_recurrent_modules

_lock = threading.RLock()
_depth = 0
_INHERITED = object()
_before: dict[routes.Place, Any] = {}  # what stood at a place before
_there: dict[routes.Place, Any] = {}  # what we put there


class accelerate(ContextDecorator):
    """Run torch's own functions and modules on seqkern's kernels inside the block.

    These are replaced: `torch.nn.functional.cross_entropy` (so `torch.nn.CrossEntropyLoss` too),
    `scaled_dot_product_attention` where it is causal with as many keys as queries and no mask,
    `linear_cross_entropy` where torch has it, softmax and log_softmax of large tensors over the
    last dimension (as functions, methods and modules), and the forward of `torch.nn.LSTM`, `GRU`,
    `RNN`, `LSTMCell`, `GRUCell` and `RNNCell`. A call that ours cannot take, or where it would be
    slower (on the CPU: losses of few logits, small steps of an RNN), goes to torch and gives
    torch's result exactly; every other call of torch's is not touched, and costs nothing.
    Ours equals torch's to rounding; dropped weights of attention are other ones for the same seed.
    Our cross-entropy keeps the logits for its backward, where torch's keeps their log-softmax:
    logits that are changed in place in between are an error of autograd's there (`modified by an
    inplace operation`). Change a copy of them instead. The same holds for what GRU, RNN and the
    cells return, which their backward reads, too.
    A forward that `torch.utils.checkpoint` repeats in the backward repeats torch's, with other
    dropped weights, if the backward runs outside of the block: run it inside.

    A model that keeps a replaced function (`self.loss = F.cross_entropy` in a block) is pickled by
    torch's name in a block, and by one of seqkern's outside: seqkern must be installed where that
    is read. One that keeps torch's own `cross_entropy` or `linear_cross_entropy`, made before the
    block, is pickled outside of blocks only: pickle takes functions by their names, and ours stand
    there (`PicklingError: not the same object`). Its state_dict can be saved anywhere.

    Blocks may be nested and left by an exception. It holds for all threads. As a decorator it holds
    during each call. `accelerate.enable()` switches it on until as many `accelerate.disable()`.
    Works under `torch.compile`; `torch.export`, `torch.jit` and `torch.func` transforms get torch's
    own functions. Not seen are functions that were imported by name before (`from
    torch.nn.functional import cross_entropy`); `seqkern run` is in force before the first import.

    Example:
        >>> model, x = torch.nn.LSTM(8, 16), torch.randn(5, 2, 8)
        >>> with seqkern.accelerate():
        ...     output, state = model(x)
    """

    def __enter__(self) -> accelerate:
        """Enter the block."""
        accelerate.enable()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave it."""
        accelerate.disable()

    @staticmethod
    def enable() -> None:
        """Switch acceleration on; it nests."""
        global _depth
        with _lock:
            _depth += 1
            if _depth == 1:
                _install()

    @staticmethod
    def disable() -> None:
        """Undo one `enable`.

        Raises:
            RuntimeError: acceleration is not on.
        """
        global _depth
        with _lock:
            if _depth == 0:
                raise RuntimeError("accelerate.disable: acceleration is not on")
            _depth -= 1
            if _depth == 0:
                _remove()

    @staticmethod
    def is_enabled() -> bool:
        """Whether acceleration is on."""
        return _depth > 0


def _install() -> None:
    # TorchScript compiles torch's functions from their source, which ours cannot stand for.
    scripting = {place: _without(getattr(*place)) for place in _scripting()}
    for place, replacement in {**routes.routes(), **scripting}.items():
        owner, name = place
        keep_out_of_tables(replacement, getattr(owner, name))
        _before[place] = vars(owner).get(name, _INHERITED)
        _there[place] = replacement
        kept.name_inside(replacement, owner, name)
        setattr(owner, name, replacement)
    allow_recurrent_modules()
    routes.active = True


def _scripting() -> list[routes.Place]:
    """What compiles for TorchScript: on request, and where a `torch.jit.ScriptModule` is made."""
    places: list[routes.Place] = [(torch.jit, "script")]
    recursive = getattr(torch.jit, "_recursive", None)
    if hasattr(recursive, "create_script_module"):
        places.append((recursive, "create_script_module"))
    return places


def _remove() -> None:
    routes.active = False
    for place, replacement in _there.items():
        owner, name = place
        kept.name_outside(replacement)
        # What somebody else has put there since stays; it may call ours, which then calls torch's.
        if getattr(owner, name) is not replacement:
            continue
        if _before[place] is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, _before[place])
    _there.clear()
    _before.clear()


def _without(function: Any) -> Any:
    @functools.wraps(function)
    def suspended(*args: Any, **kwargs: Any) -> Any:
        with _lock:
            if not _there:
                return function(*args, **kwargs)
            _remove()
            try:
                return function(*args, **kwargs)
            finally:
                _install()

    return suspended
