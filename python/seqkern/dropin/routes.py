"""Replacements of torch's functions: ours where it fits, torch's own everywhere else."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from seqkern import ops
from seqkern.dropin import conditions
from seqkern.dropin.counts import note
from seqkern.dropin.kinds import KINDS, Kind
from seqkern.nn._dynamo import let_into_graphs
from seqkern.ops._autocast import autocast

Place = tuple[Any, str]  # an object and the name of its attribute

_NOT_JUDGED = (TypeError, AttributeError, ValueError, IndexError)

#: Whether replaced functions look at their calls at all. False outside of every block: who has
#: kept a replacement, as `from torch.nn.functional import cross_entropy` does, has torch's then.
active = False


@functools.lru_cache(64)  # the same functions in every block: models keep them
def _route(
    name: str, original: Any, why_not: Callable[..., str], run: Callable[..., Any]
) -> Callable[..., Any]:
    # A function of torch.nn.functional written in Python gives a tensor subclass what stands in its
    # module under its name: ours. We give it torch's, which the subclass knows.
    offers_itself = getattr(original, "__globals__", None) is vars(F)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        if active:
            reason = conditions.context() or conditions.foreign(args, kwargs)
            if not reason:
                try:
                    reason = why_not(*args, **kwargs)
                except _NOT_JUDGED:  # other arguments than torch documents, or not of its types
                    reason = conditions.UNFIT
            note(name, reason)
            if not reason:
                return run(*args, **kwargs)
            if offers_itself and reason.startswith(conditions.SUBCLASS):
                relevant = [t for t in (*args, *kwargs.values()) if conditions.is_foreign(t)]
                if has_torch_function(relevant):
                    args, kwargs = _as_offered(original, args, kwargs)
                    return handle_torch_function(original, relevant, *args, **kwargs)
        return original(*args, **kwargs)

    return let_into_graphs(replacement)


def _as_offered(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as torch's functions hand them on: by name if they have a default, and all."""
    if torch.compiler.is_compiling():  # Dynamo does not trace a signature
        return args, kwargs
    signature = inspect.signature(original)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return args, kwargs
    bound.apply_defaults()
    named = {
        name
        for name, parameter in signature.parameters.items()
        if parameter.default is not parameter.empty
    }
    given = bound.arguments.items()
    return (
        tuple(value for name, value in given if name not in named),
        {name: value for name, value in given if name in named},
    )


def _as_torchs(loss: Tensor, input: Tensor) -> Tensor:
    """A loss in torch's dtype: of the logits, but under autocast, which makes them float32."""
    if loss.dtype == input.dtype or torch.is_autocast_enabled(input.device.type):
        return loss
    return loss.to(input.dtype)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    loss = ops.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    return _as_torchs(loss, input)


def _linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object = None,
) -> Tensor:
    loss = ops.linear_cross_entropy(
        input,
        linear_weight,
        target,
        linear_bias,
        class_weight=weight,
        reduction=reduction,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
    )
    assert isinstance(loss, Tensor)
    return _as_torchs(loss, input)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.dtype != torch.float64:
        query, key, value = autocast(query, key, value)
    return ops.causal_attention(query, key, value, scale=scale, dropout_p=dropout_p)


@functools.cache
def _last_dimension(ours: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(
        input: Tensor, dim: int, dtype: torch.dtype | None = None, *, out: None = None
    ) -> Tensor:
        return ours(input)

    return run


def _forward(kind: Kind) -> Callable[..., Any]:
    ours: Any = kind.ours
    why_not = conditions.cell if kind.name.endswith("Cell") else conditions.recurrent
    return _route(f"torch.nn.{kind.name}", kind.torchs.forward, why_not, ours.forward)


def routes() -> dict[Place, Any]:
    """What stands where while acceleration is on."""
    functional = "torch.nn.functional"
    found: dict[Place, Any] = {
        (F, "cross_entropy"): _route(
            f"{functional}.cross_entropy", F.cross_entropy, conditions.cross_entropy, _cross_entropy
        ),
        (F, "scaled_dot_product_attention"): _route(
            f"{functional}.scaled_dot_product_attention",
            F.scaled_dot_product_attention,
            conditions.scaled_dot_product_attention,
            _attention,
        ),
    }
    if hasattr(F, "linear_cross_entropy"):
        found[F, "linear_cross_entropy"] = _route(
            f"{functional}.linear_cross_entropy",
            F.linear_cross_entropy,
            conditions.linear_cross_entropy,
            _linear_cross_entropy,
        )
    # torch.nn.functional's and the modules' call the methods.
    for name, ours in (("softmax", ops.softmax), ("log_softmax", ops.log_softmax)):
        for place, owner, why_not in (
            ("torch", torch, getattr(conditions, name)),
            ("torch.Tensor", Tensor, getattr(conditions, f"{name}_method")),
        ):
            found[owner, name] = _route(
                f"{place}.{name}", getattr(owner, name), why_not, _last_dimension(ours)
            )
    for kind in KINDS.values():
        if kind.recurrent and kind.ours is not None:
            found[kind.torchs, "forward"] = _forward(kind)
    return found
