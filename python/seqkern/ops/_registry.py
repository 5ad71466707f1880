"""Which library of kernels the ops call, and what Python adds to the ops registered in C++.

The public functions call `_registry.active.<op>`: `torch.ops.seqkern`, unless a test routes them
to the host emulator's `torch.ops.seqkern_emu`, which registers the same ops.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

active: Any = torch.ops.seqkern

_USER_ERRORS = {"ValueError: ": ValueError, "IndexError: ": IndexError}


def call(op: Any, *args: Any) -> Any:
    """Call an op of ours; mistakes in its arguments are raised as what they are.

    The text of such an error begins with its kind (csrc/common/errors.h): torch turns C++
    exceptions into Python ones differently from version to version.

    No kernel has a forward-mode derivative. The ops that decode have no other way than theirs, and
    would return results without a tangent, which count as constants: that is refused here.
    """
    if _is_forward_mode() and any(_has_tangent(t) for t in _tensors(args)):
        raise NotImplementedError(
            f"{_name(op)}: no forward-mode derivative; differentiate in reverse mode, use "
            "PyTorch's own functions, or detach() the arguments"
        )
    try:
        return op(*args)
    except RuntimeError as error:
        for prefix, kind in _USER_ERRORS.items():
            if str(error).startswith(prefix):
                raise kind(str(error).removeprefix(prefix)) from None
        raise


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether an op is to run as its reference in plain PyTorch, as functions to be transformed do.

    That is inside `torch.func`'s transforms, which ask for rules that the kernels do not have, in
    forward-mode differentiation, and in traces of torch.jit, which are to run without seqkern.
    """
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return True
    return _is_forward_mode() and any(_has_tangent(t) for t in tensors if t is not None)


def _is_forward_mode() -> bool:
    return forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from _tensors(arg)


def _has_tangent(t: Tensor) -> bool:
    """At any level of forward-mode differentiation that is active."""
    unpack: Any = forward_ad.unpack_dual
    functorch = torch._C._functorch
    transform = functorch.peek_interpreter_stack()
    if transform is None:
        return unpack(t).tangent is not None
    # Inside torch.func only the innermost transform is asked, and vmap cannot answer.
    if transform.key() == functorch.TransformType.Jvp and unpack(t).tangent is not None:
        return True
    if (
        functorch.is_functorch_wrapped_tensor(t)
        and functorch.maybe_get_level(t) == transform.level()
    ):
        t = functorch.get_unwrapped(t)
    with temporarily_pop_interpreter_stack():
        return _has_tangent(t)


def _name(op: Any) -> str:
    """What errors call an op by, or the op of an `autograd.Function` whose `apply` this is."""
    if isinstance(op, torch._ops.OpOverloadPacket):
        return op.__name__.removesuffix("_forward")
    words = re.findall("[A-Z][a-z]*", op.__self__.__name__)
    return "_".join(words).lower()


_registrations: list[Callable[[str], None]] = []


def registration(register: Callable[[str], None]) -> Callable[[str], None]:
    """Decorate an op file's `register(namespace)`: run for `seqkern` now, for others later."""
    _registrations.append(register)
    register("seqkern")
    return register


def register_all(namespace: str) -> None:
    """Give the ops of another library (the emulator) their fakes and gradients."""
    for register in _registrations:
        register(namespace)


@contextmanager
def use_namespace(namespace: str) -> Iterator[None]:
    """Route every op to `torch.ops.<namespace>` inside the block."""
    global active
    previous = active
    active = getattr(torch.ops, namespace)
    try:
        yield
    finally:
        active = previous
