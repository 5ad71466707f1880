"""Which library of kernels the ops call, and what Python adds to the ops registered in C++.

The public functions call `_registry.active.<op>`: `torch.ops.seqkern`, unless a test routes them
to the host emulator's `torch.ops.seqkern_emu`, which registers the same ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

active: Any = torch.ops.seqkern

_USER_ERRORS = {"ValueError: ": ValueError, "IndexError: ": IndexError}


def call(op: Any, *args: Any) -> Any:
    """Call an op of ours; mistakes in its arguments are raised as what they are.

    The text of such an error begins with its kind (csrc/common/errors.h): torch turns C++
    exceptions into Python ones differently from version to version.
    """
    try:
        return op(*args)
    except RuntimeError as error:
        for prefix, kind in _USER_ERRORS.items():
            if str(error).startswith(prefix):
                raise kind(str(error).removeprefix(prefix)) from None
        raise


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
