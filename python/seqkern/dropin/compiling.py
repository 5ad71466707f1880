"""Shows Dynamo torch's own functions where it makes tables of them.

Dynamo puts the functions of its tables into graphs as they are, and looks them up by name when a
table is first asked for. Were ours in force then, ours would stand in the tables: a compiled
`cross_entropy` would be one node of the graph, run later on tensors that no kernel takes, instead
of being traced to our ops; and torch's own, once acceleration is over, would be unknown. The tables
are private. Where a version of torch has them otherwise, compiled code is right still, on torch's
functions.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from seqkern.nn._dynamo import when_imported

_RULES = "torch._dynamo.trace_rules"

#: What each replacement that was ever in force stands for.
_originals: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def keep_out_of_tables(replacement: Any, original: Any) -> None:
    """Let Dynamo find `original` where it looks for it and `replacement` is in force."""
    _originals[replacement] = original
    when_imported(_RULES, _show_originals)


def _show_originals(rules: ModuleType) -> None:
    if getattr(rules, "_shows_seqkerns_originals", False):
        return
    rules._shows_seqkerns_originals = True  # type: ignore[attr-defined]

    load = getattr(rules, "load_object", None)
    if load is not None:

        @functools.wraps(load)
        def load_object(name: str) -> Any:
            found = load(name)
            try:
                return _originals.get(found, found)
            except TypeError:  # it is nothing that can be referred to weakly
                return found

        rules.load_object = load_object  # type: ignore[attr-defined]

    methods = getattr(rules, "get_tensor_method", None)
    if methods is not None:

        @functools.cache
        def get_tensor_method() -> frozenset[Any]:
            ours = {vars(torch.Tensor).get(name) for name in ("softmax", "log_softmax")}
            return frozenset(methods() | {_originals[f] for f in ours if f in _originals})

        rules.get_tensor_method = get_tensor_method  # type: ignore[attr-defined]
