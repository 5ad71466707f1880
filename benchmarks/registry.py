"""What a benchmark is, and where they are found.

A file `bench_<op>.py` in this folder holds one `BENCHMARK`; it is found by its name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"

Forward = Callable[..., Tensor | tuple[Tensor, ...]]

# Largest relative error (benchmarks.check) a peer may have and still be timed. It tells a wrong
# result from a rounded one and lets every correct peer pass; how accurate ours is, the tests say.
TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 5e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


class UnavailableError(Exception):
    """Raised by a peer that cannot run here; its text is the reason, for the report."""


def need(module: str) -> ModuleType:
    """Import a module that a peer needs; UnavailableError where it cannot be."""
    try:
        return importlib.import_module(module)
    except ImportError as reason:
        raise UnavailableError(f"cannot be imported: {str(reason).splitlines()[0]}") from None


class Case:
    """The sizes of one problem: `Case(N=2048, V=50257)` prints as 2048x50257."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def __str__(self) -> str:
        return "x".join(str(size) for size in self.sizes.values())

    def __repr__(self) -> str:
        return f"Case({', '.join(f'{letter}={size}' for letter, size in self.sizes.items())})"


@dataclass(frozen=True)
class Cost:
    """What any implementation has to move and compute at least: bytes, floating operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Problem:
    """Inputs of a case: every peer's forward is called as `forward(*args)`.

    `wrt` are the positions in `args` that get gradients. `upstream` holds a gradient for each
    output, or is None for a scalar loss with gradient 1.
    """

    args: tuple[Tensor, ...]
    wrt: tuple[int, ...] = (0,)
    upstream: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Reference:
    """The float64 truth: outputs, and gradients in the order of `Problem.wrt`."""

    outputs: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    # For results drawn at random: the error of one, in place of its distance from `outputs`.
    judge: Callable[[tuple[Tensor, ...]], float] | None = None


def by_autograd(forward: Forward) -> Callable[[Problem], Reference]:
    """A reference from a forward function, evaluated in float64 with torch's own autograd."""

    def reference(problem: Problem) -> Reference:
        args = [a.double() if a.is_floating_point() else a for a in problem.args]
        leaves = [args[i].detach().clone().requires_grad_() for i in problem.wrt]
        for i, leaf in zip(problem.wrt, leaves, strict=True):
            args[i] = leaf
        result = forward(*args)
        outputs = (result,) if isinstance(result, Tensor) else result
        upstream = problem.upstream and [g.double() for g in problem.upstream]
        grads = torch.autograd.grad(outputs, leaves, upstream)
        return Reference(tuple(o.detach() for o in outputs), tuple(grads))

    return reference


@dataclass(frozen=True)
class Peer:
    """One implementation. `build` prepares it for a problem and returns its forward function, or
    raises UnavailableError with the reason.

    An `optional` peer runs only when it is asked for by name. One that `overwrites` its inputs gets
    its own copy of them. `note` is printed under the table.
    """

    name: str
    build: Callable[[Problem], Forward]
    optional: bool = False
    overwrites: bool = False
    note: str = ""


@dataclass(frozen=True)
class Benchmark:
    """An op, its problems, and who is measured on them; the first peer is the baseline."""

    op: str
    axes: str  # what the numbers of a case's name are, for people: "N x V"
    cases: tuple[Case, ...]
    quick: tuple[Case, ...]
    make: Callable[[Case, torch.dtype, torch.device, torch.Generator], Problem]
    reference: Callable[[Problem], Reference]
    cost: Callable[[Case, torch.dtype, str], Cost]
    peers: tuple[Peer, ...]
    cuda_cases: tuple[Case, ...] = ()  # measured as well on a GPU, too large for most CPUs
    memory: bool = False  # the peak of each peer is measured and shown as well
    # "bytes" is shown as GB/s beside the copy, "flops" as GFLOP/s beside the GEMM.
    bound: str = "bytes"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    more_dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.float64)
    modes: tuple[str, ...] = (FORWARD, FORWARD_BACKWARD)
    tolerance: Mapping[torch.dtype, float] = field(default_factory=lambda: TOLERANCE)


def discover() -> dict[str, Benchmark]:
    """Every `BENCHMARK` of the `bench_<op>.py` files beside this one, by op."""
    folder = str(Path(__file__).parent)
    names = sorted(m.name for m in pkgutil.iter_modules([folder]) if m.name.startswith("bench_"))
    found = (importlib.import_module(f"benchmarks.{name}").BENCHMARK for name in names)
    return {benchmark.op: benchmark for benchmark in found}
