"""What the fakes of all ops share: they check what a kernel would, as far as there is something to
look at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def register_fake(namespace: str, name: str, fake: Callable[..., Any]) -> None:
    """The fake of an op, called with its tensors on one device alone.

    A single tensor on meta brings the whole call here, and results like those on the CPU beside it
    would be memory that nothing was written to.
    """

    @functools.wraps(fake)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_devices(namespace, name, (*enumerate(args), *kwargs.items()))
        return fake(*args, **kwargs)

    torch.library.register_fake(f"{namespace}::{name}", checked)


def _check_devices(namespace: str, op: str, given: Sequence[tuple[int | str, Any]]) -> None:
    """ValueError unless all tensors are on one device."""
    tensors = [
        (key, t)
        for key, value in given
        for t in (value if isinstance(value, list | tuple) else (value,))
        if isinstance(t, Tensor)
    ]
    first, device = tensors[0][0], tensors[0][1].device
    for key, t in tensors:
        if t.device != device:
            schema = getattr(getattr(torch.ops, namespace), op).default._schema
            other, like = (
                schema.arguments[k].name.removesuffix("_rows") if isinstance(k, int) else k
                for k in (key, first)
            )
            raise ValueError(
                f"{op.removesuffix('_forward')}: {other} must be on the device of {like}, "
                f"{device}, got {t.device}"
            )


def check_shape(op: str, name: str, t: Tensor | None, shape: Sequence[Any]) -> None:
    """ValueError unless `t`, where it is given, has this shape; a size of None may be any."""
    if t is None:
        return

    def message() -> str:
        words = ", ".join("*" if size is None else str(size) for size in shape)
        return f"{op}: {name} must be [{words}], got {list(t.shape)}"

    check: Any = torch._check_value  # which takes sizes that are known at run time only
    check(t.dim() == len(shape), message)
    for size, expected in zip(t.shape, shape, strict=True):
        if expected is not None:
            check(size == expected, message)
