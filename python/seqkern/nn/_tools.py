"""Tools of torch's that look into modules: they take ours as they take torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Forward = TypeVar("Forward", bound=Callable[..., Any])


class StandsForTorchs:
    """A module that is one of torch's with another `forward`."""

    def __prepare_scriptable__(self) -> Any:
        """TorchScript asks for what it should compile: torch's source, which is not ours."""
        name = type(self).__name__
        raise NotImplementedError(
            f"{name}: torch.jit.script compiles torch.nn.{name} alone; call seqkern.unpatch on the "
            "model first, or load the state_dict into torch's module"
        )


def taken_whole(forward: Forward) -> Forward:
    """Decorate the `forward` of a module that stands for one of torch's.

    Symbolic traces of torch.fx take it for one step, as they take what is torch's. In traces of
    torch.jit a recurrent one runs as torch's, which is a single operation there; the ops that
    others call run in torch's operations by themselves. So the graph needs no seqkern.
    """

    @wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            first = args[0] if args else None
            tracer = first.tracer if isinstance(first, torch.fx.Proxy) else None
            if isinstance(tracer, torch.fx.Tracer) and tracer.root is not self:
                path = tracer.path_of_module(self)
                return tracer.create_proxy("call_module", path, args, kwargs)
            if torch._C._get_tracing_state() is not None and _is_torchs_call(self, args, kwargs):
                return _torchs(self).forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    return cast(Forward, call)


def _is_torchs_call(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether a call has nothing that torch's recurrent modules do not know."""
    recurrent = torch.nn.RNNBase | torch.nn.RNNCellBase
    return isinstance(module, recurrent) and len(args) <= 2 and not set(kwargs) - {"input", "hx"}


def _torchs(module: torch.nn.Module) -> Any:
    kinds = type(module).__mro__
    return next(kind for kind in kinds if kind.__module__.startswith("torch.nn."))
