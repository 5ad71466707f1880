"""One line for a call that failed: which argument was wrong, what was expected, what came.

What the kernels' torch layer refuses, it names itself. What never gets there (a list in place of a
tensor, None, 1.5 for an integer) ends in whatever Python or torch's dispatcher says, so the
arguments are compared with the function's annotations, after the failure: a right call pays for
the wrapper alone (0.2 us).
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
#: What an op knows of its own failures: of the error and all arguments, the error to raise or None.
Diagnosis = Callable[..., Exception | None]

_WORDS: dict[Any, str] = {
    type(None): "None",
    Tensor: "a tensor",
    bool: "True or False",
    float: "a number",
    int: "an integer",
    str: "a string",
}
_INT64 = range(-(2**63), 2**63)


def checked(
    op: str | None = None, diagnosis: Diagnosis | None = None, first: bool = False
) -> Callable[[Function], Function]:
    """Decorate a public function, or without `op` a method: errors begin with its class's name.

    `first`: look at the types before the call, where that takes no time that matters.
    """

    def name(args: tuple[Any, ...]) -> str:
        return op if op is not None else type(args[0]).__name__

    def decorate(function: Function) -> Function:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                if first and (wrong := _explain(function, name(args), None, None, args, kwargs)):
                    raise wrong
                return function(*args, **kwargs)
            except Exception as error:
                if torch.compiler.is_compiling():
                    raise
                with torch._C.DisableTorchFunctionSubclass():  # subclasses may have an opinion
                    found = _explain(function, name(args), diagnosis, error, args, kwargs)
                if found is None:
                    raise
                raise found from None

        return call  # type: ignore[return-value]

    return decorate


def _explain(
    function: Callable[..., Any],
    op: str,
    diagnosis: Diagnosis | None,
    error: Exception | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Exception | None:
    """The error that says what `error` came from, if an argument is wrong."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:  # one argument too many or too few, which Python says in one line
        return None
    bound.apply_defaults()
    given = bound.arguments
    text = str(error)
    is_ours = (
        isinstance(error, ValueError | TypeError | IndexError)
        and text.startswith(f"{op}: ")
        and "\n" not in text  # the value of an option may bring some
    )
    if not is_ours:
        for name, value in _tensors(given.items()):
            if came := _unusable(value):
                return ValueError(
                    f"{op}: {name} must be a dense tensor on the CPU or a GPU, got {came}"
                )
        kinds = typing.get_type_hints(function)
        for name, value in given.items():
            if name in kinds and (found := _mistake(f"{op}: {name}", value, kinds[name])):
                return found
    return diagnosis(error, **given) if diagnosis is not None and error is not None else None


def _tensors(named: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Tensor]]:
    for name, value in named:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple | list):
            yield from _tensors((f"{name}[{n}]", part) for n, part in enumerate(value))


def _unusable(value: Tensor) -> str:
    """What a tensor is that has no memory with one place for each element, or "" if it has."""
    if value.is_nested:
        return "a nested tensor"
    if value.is_quantized:
        return "a quantized tensor"
    if value.layout != torch.strided:
        return f"{value.layout} on {value.device}"
    is_known = value.device.type in ("cpu", "cuda", "meta")
    return "" if is_known else f"one on {value.device}"


def _mistake(name: str, value: Any, kind: Any) -> Exception | None:
    """What is wrong with `value`, of which `kind` was expected."""
    if _fits(value, kind):
        return None
    kinds = _alternatives(kind)
    for parts in filter(_is_sequence, kinds):
        if isinstance(value, tuple | list):
            wanted = typing.get_args(parts)
            is_pair = typing.get_origin(parts) is tuple
            if is_pair and len(value) != len(wanted):
                break
            for n, part in enumerate(value):
                if found := _mistake(f"{name}[{n}]", part, wanted[n if is_pair else 0]):
                    return found
    if int in kinds and isinstance(value, int):
        return ValueError(f"{name} must be in [-2**63, 2**63), got {describe(value)}")
    expected = " or ".join(_words(k) for k in kinds)
    hint = ""
    if Tensor in kinds and isinstance(getattr(value, "weight", None), Tensor):
        hint = "; pass its weight"
    wrong: type[Exception] = TypeError
    has_pair = any(typing.get_origin(k) is tuple for k in kinds)
    if has_pair and isinstance(value, tuple | list | Tensor):
        wrong = ValueError  # of a wrong length
    return wrong(f"{name} must be {expected}, got {describe(value)}{hint}")


def _alternatives(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def _is_sequence(kind: Any) -> bool:
    return typing.get_origin(kind) in (tuple, Sequence)


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return "a pair of " + ("tensors" if Tensor in typing.get_args(kind) else "integers")
    if _is_sequence(kind):
        return "a list of tensors"
    return _WORDS.get(kind) or f"a {kind.__name__}"


def _fits(value: Any, kind: Any) -> bool:
    """Whether the ops take `value` for `kind`; numbers are what the dispatcher takes for one."""
    if len(kinds := _alternatives(kind)) > 1:
        return any(_fits(value, k) for k in kinds)
    if _is_sequence(kind):
        wanted = typing.get_args(kind)
        if isinstance(value, Tensor):  # a pair of tensors may be one, as that can be unpacked
            is_pair = typing.get_origin(kind) is tuple
            return is_pair and value.dim() > 0 and len(value) == len(wanted)
        if not isinstance(value, tuple | list):
            return False
        if typing.get_origin(kind) is tuple:
            same = len(value) == len(wanted)
            return same and all(_fits(v, k) for v, k in zip(value, wanted, strict=True))
        return all(_fits(v, wanted[0]) for v in value)
    if kind is bool:
        return value is None or _is_number(value)
    if kind is float:
        return _is_number(value)
    if kind is int:
        in_range = not isinstance(value, int) or value in _INT64
        return in_range and hasattr(value, "__index__") and _is_number(value)
    return isinstance(value, kind)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    if hasattr(value, "__len__"):  # float("1") is a number, and so is that of an array of one
        return False
    try:
        float(value)
    except (TypeError, OverflowError):
        return False
    return True


def describe(value: Any) -> str:
    """A few words for what came: "None", "1.5", "'mean'", "float32 [3, 5]", "list of 3"."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    if value is None or isinstance(value, bool | int | float | complex | str):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    size = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"{type(value).__name__}{size}"


def dtype_name(dtype: torch.dtype) -> str:
    """As the kernels' torch layer says it: "float32"."""
    return str(dtype).removeprefix("torch.")
