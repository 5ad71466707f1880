"""What autocast does to the arguments of an op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def is_casting(t: Tensor) -> bool:
    """Whether autocast is on for a tensor's device."""
    device = "cpu" if t.is_cpu else t.device.type  # the second takes six times as long
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where that is on, as the factors of a product.

    Float64 is left alone, as autocast leaves it; so are integers, which may be tokens.
    """
    if not is_casting(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t.to(dtype) if _is_cast(t) else t for t in tensors)


def agreed(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where that is on and they have several dtypes.

    What has one dtype stays: the kernels accumulate in float32 whatever they read.
    """
    if not is_casting(tensors[0]):
        return tensors
    dtypes = {t.dtype for t in tensors if _is_cast(t)}
    return autocast(*tensors) if len(dtypes) > 1 else tensors


def autocast_weights(*weights: Any) -> tuple[Any, ...]:
    """`autocast` of a layer's weights, of parameters on the CPU once for several calls.

    A step of a cell takes less time than the cast, which torch makes once in a region of autocast.
    But what shares a cast has its gradients summed in 16 bits: over 1000 steps torch's are off by
    half their size. So only `_SHARING` calls share one, and their sums meet in float32.
    """
    if not weights[0].is_cpu or not torch.is_autocast_enabled("cpu"):
        return autocast(*weights)
    kept = _region()
    if kept is None:
        return autocast(*weights)
    present = [w for w in weights if w is not None]
    if any(type(w) is not torch.nn.Parameter or w.is_inference() for w in present):
        return autocast(*weights)
    key = (
        *map(id, weights),
        torch.get_autocast_dtype("cpu"),
        torch.is_grad_enabled(),  # a cast made without has no gradient
        torch.is_inference_mode_enabled(),
    )
    state = [(w._version, w.data_ptr(), w.requires_grad) for w in present]
    found = kept.get(key)
    if found is None or found.state != state or found.calls == _SHARING:
        kept[key] = found = _Casts(weights, state, autocast(*weights))
    found.calls += torch.is_grad_enabled()
    return found.results


_SHARING = 8


@dataclass
class _Casts:
    weights: tuple[Tensor | None, ...]  # kept, so that no others come to have their ids
    state: list[Any]
    results: tuple[Any, ...]
    calls: int = 0  # that may need gradients


_SENTINEL = torch.nn.Parameter(torch.ones(1, 1))
_KEPT = "seqkern"


def _region() -> dict[Any, _Casts] | None:
    """What lives as long as this region of autocast, or None where nothing may be kept.

    Autocast keeps the casts of parameters, and drops them where its outermost region ends. One of
    these is the sentinel's; the node of the graph that made it goes with it, and what is attached
    to that. Where autocast keeps none (`cache_enabled=False`) every node is a new one.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        product = torch.mm(_SENTINEL, _SENTINEL)
    else:
        with torch.inference_mode(False), torch.enable_grad():
            product = torch.mm(_SENTINEL, _SENTINEL)
    assert product.grad_fn is not None
    cast: Any = product.grad_fn.next_functions[0][0]
    kept: dict[Any, _Casts] = cast.metadata.setdefault(_KEPT, {})
    return kept


def _is_cast(t: Any) -> bool:
    return t is not None and t.is_floating_point() and t.dtype != torch.float64
