"""Turn a peer's forward function into the step that is timed, once its result was checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from benchmarks.registry import FORWARD, Forward, Problem, Reference

# Elements compared at a time: float64 temporaries that stay in cache, where whole ones would cost
# seconds of page faults.
_CHUNK = 1 << 20


def relative_error(result: Tensor, truth: Tensor) -> float:
    """The larger of max|result - truth| / max|truth| and sum|result - truth| / sum|truth|.

    The maximum alone would not see a gradient whose many small entries are all wrong beside a few
    large ones, the sum alone not a single wild one. Not finite means wrong, and compares as such.
    """
    if result.shape != truth.shape:
        return math.inf
    largest = total = largest_truth = total_truth = 0.0
    parts = torch.split(result.flatten(), _CHUNK)
    for part, exact in zip(parts, torch.split(truth.flatten(), _CHUNK), strict=True):
        difference = part.double() - exact
        most, sum_ = (vector_norm(difference, order).item() for order in (torch.inf, 1))
        if not math.isfinite(sum_):
            return math.inf
        largest, total = max(largest, most), total + sum_
        largest_truth = max(largest_truth, vector_norm(exact, torch.inf).item())
        total_truth += vector_norm(exact, 1).item()
    if largest_truth == 0:
        return largest
    return max(largest / largest_truth, total / total_truth)


@dataclass(frozen=True)
class Prepared:
    """A peer ready to be timed: `step` is one call, `error` what its first result was off by."""

    step: Callable[[], object]
    error: float


def prepare(
    forward: Forward, problem: Problem, mode: str, truth: Reference, copy: bool
) -> Prepared:
    """Run `forward` once in `mode`, compare with `truth`, and make the step that is timed.

    The caller sets the grad mode around both this and the timing: entering `no_grad` in each step
    would cost as much as a small problem. `copy` gives the peer inputs of its own.
    """
    args = [a.clone() if copy else a.detach() for a in problem.args]
    if mode == FORWARD:
        outputs = _tuple(forward(*args))
        error = truth.judge(outputs) if truth.judge else _worst(outputs, truth.outputs)
        return Prepared(lambda: forward(*args), error)

    leaves = [args[i].requires_grad_() for i in problem.wrt]
    result = forward(*args)
    outputs = _tuple(result)
    # A peer's loss may be wider than another's; the gradient it receives has to have its dtype.
    upstream = problem.upstream and [
        g.to(o.dtype) for g, o in zip(problem.upstream, outputs, strict=True)
    ]
    torch.autograd.backward(outputs, upstream)
    grads = [
        torch.full_like(leaf, torch.nan) if leaf.grad is None else leaf.grad for leaf in leaves
    ]
    error = max(_worst(outputs, truth.outputs), _worst(grads, truth.grads))
    del result, outputs, grads
    _clear(leaves)

    def step() -> None:
        torch.autograd.backward(_tuple(forward(*args)), upstream)
        # Here and not before the forward: each peer pays for freeing the gradient it made itself.
        _clear(leaves)

    return Prepared(step, error)


def _clear(leaves: Sequence[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _worst(results: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    with torch.no_grad():
        pairs = zip(results, truths, strict=True)
        return max(relative_error(result, truth) for result, truth in pairs)
