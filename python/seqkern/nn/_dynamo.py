"""Lets torch.compile trace the recurrent modules.

Dynamo refuses every instance of torch.nn.LSTM, GRU and RNN, since it cannot trace torch's own fused
forward (`torch._dynamo.config.allow_rnn`). Ours are instances of those classes with a forward that
it traces whole, so the refusal is switched off: at once if Dynamo is there, or else when it is
first imported, which by itself takes seconds and is not ours to start. torch's own modules are then
traced too, step by step, where they were left out of graphs.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CONFIG = "torch._dynamo.config"


class _Loader(Loader):
    """The loader of Dynamo's configuration, with our setting after it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        sys.modules[_CONFIG].allow_rnn = True  # type: ignore[attr-defined]


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


_finder = _Finder()


def allow_recurrent_modules() -> None:
    """Switch the refusal off, now or when Dynamo comes."""
    if _CONFIG in sys.modules:
        sys.modules[_CONFIG].allow_rnn = True  # type: ignore[attr-defined]
    elif _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
