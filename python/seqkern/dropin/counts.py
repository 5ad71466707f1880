"""Which calls ran on our kernels, how often, and which did not and why: counted on request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Counts = Counter[tuple[str, str]]  # calls by function and reason; "" for a call that was ours

_COMPILED = "compiled: "  # before the reason of a call that was traced into a graph

_counts: Counts | None = None


@contextmanager
def counting() -> Iterator[Counts]:
    """Count the calls of every replaced function inside the block."""
    global _counts
    before, _counts = _counts, Counter()
    try:
        yield _counts
    finally:
        _counts = before


def note(function: str, reason: str) -> None:
    """Count a call, if anybody asked."""
    if _counts is not None:
        if torch.compiler.is_compiling():
            _note_traced(function, reason)
        else:
            _counts[function, reason] += 1


def _note_traced(function: str, reason: str) -> None:
    assert _counts is not None
    _counts[function, _COMPILED + reason] += 1


# Dynamo runs such a function while it traces, once per graph, instead of tracing it: what
# torch.compiler.assume_constant_result does, without its import of Dynamo.
_note_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def table(counts: Counts) -> str:
    """A line per function and reason, ours first."""
    if not counts:
        return "seqkern: no call that it knows was made"
    lines = ["seqkern: calls of torch's functions"]
    width = max(len(function) for function, _ in counts)
    for (function, reason), number in sorted(
        counts.items(), key=lambda item: (item[0][1].removeprefix(_COMPILED) != "", item[0])
    ):
        plain = reason.removeprefix(_COMPILED)
        times = "graphs compiled" if reason.startswith(_COMPILED) else "calls"
        where = f"torch: {plain}" if plain else "seqkern"
        lines.append(f"  {function:<{width}}  {number:>9,} {times:<15}  {where}")
    return "\n".join(lines)
