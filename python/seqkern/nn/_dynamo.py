"""What Dynamo must know of us, told when it is first imported: that takes seconds by itself, and is
not ours to start.

It refuses every instance of torch.nn.LSTM, GRU and RNN, since it cannot trace torch's own fused
forward (`torch._dynamo.config.allow_rnn`). Ours are instances of those classes with a forward that
it traces whole, so the refusal is switched off, and torch's own forwards are marked as what is left
out of graphs, as they were before.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])
Action = Callable[[ModuleType], None]

_CONFIG = "torch._dynamo.config"


def is_exporting() -> bool:
    """Whether a program is being traced that is to leave the process."""
    return torch.compiler.is_exporting()


# Dynamo runs it where it traces. Tracing it, torch before 2.13 takes every compilation for an
# export: torch's is_exporting() is the constant True there.
is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Loader(Loader):
    """The loader of a module, with an action of ours after it."""

    def __init__(self, loader: Any, action: Action) -> None:
        self.loader, self.action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        # torch's configurations put another object in their place.
        self.action(sys.modules[module.__name__])


class _Finder(MetaPathFinder):
    def __init__(self, name: str, action: Action) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.action)
        return spec


def when_imported(name: str, action: Action) -> None:
    """Call `action` with a module: now if it is imported, or else right after it is."""
    if name in sys.modules:
        action(sys.modules[name])
    elif not any(
        isinstance(finder, _Finder) and (finder.name, finder.action) == (name, action)
        for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, _Finder(name, action))


def allow_recurrent_modules() -> None:
    """Switch the refusal off, now or when Dynamo comes."""
    when_imported(_CONFIG, _allow_rnn)


def _allow_rnn(config: Any) -> None:
    if config.allow_rnn:  # by who wants torch's traced, or by us
        return
    config.allow_rnn = True
    for module in (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN):
        left_out_of_graphs(inspect.unwrap(module.forward))  # what `accelerate` may have replaced


_LEFT_OUT = "_torchdynamo_disable"


def left_out_of_graphs(function: Function) -> Function:
    """What `torch.compiler.disable` does, without an import of Dynamo: a graph ends before the
    call, and no other begins in it.
    """
    setattr(function, _LEFT_OUT, True)
    frames: Any = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):  # torch's own, and so of some versions only
        skip = frames._FrameAction.SKIP
        strategy = frames._FrameExecStrategy(skip, skip)
        frames.set_code_exec_strategy(function.__code__, strategy)
    return function


def let_into_graphs(function: Function) -> Function:
    """What stands for such a function need not be left out."""
    function.__dict__.pop(_LEFT_OUT, None)
    return function
