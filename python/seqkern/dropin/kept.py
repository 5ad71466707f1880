"""Names of replacements outside of blocks, under which pickle finds what a model has kept of them.

In a block a replacement is pickled by the name of torch's function, where it stands. Outside, that
name is torch's own. So it has another here, which is torch's function where no block ever was.
"""

from __future__ import annotations

import pkgutil
from types import ModuleType
from typing import Any

_kept: dict[str, Any] = {}


def name_inside(replacement: Any, owner: Any, name: str) -> None:
    """Name what stands at an attribute by its place."""
    is_module = isinstance(owner, ModuleType)
    replacement.__module__ = owner.__name__ if is_module else owner.__module__
    replacement.__qualname__ = name if is_module else f"{owner.__qualname__}.{name}"


def name_outside(replacement: Any) -> None:
    """Name it, whose name is that of its place, as one of this module's."""
    path = f"{replacement.__module__}.{replacement.__qualname__}"
    replacement.__module__ = __name__
    replacement.__qualname__ = path.replace(".", "__")
    _kept[replacement.__qualname__] = replacement


def __getattr__(name: str) -> Any:
    if name in _kept:
        return _kept[name]
    if name.startswith("torch__"):
        try:
            return pkgutil.resolve_name(name.replace("__", "."))
        except (ImportError, AttributeError):
            pass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
