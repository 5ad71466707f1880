"""What Dynamo must know of us, told when it is first imported: that takes seconds by itself, and is
not ours to start.

It refuses every instance of torch.nn.LSTM, GRU and RNN, since it cannot trace torch's own fused
forward (`torch._dynamo.config.allow_rnn`). Ours are instances of those classes with a forward that
it traces whole, so the refusal is switched off. torch's own modules are then traced too, step by
step, where they were left out of graphs.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

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


def _allow_rnn(config: ModuleType) -> None:
    config.allow_rnn = True  # type: ignore[attr-defined]
