"""Run one benchmark on one case: prepare every peer, check it, time those that passed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.check import Prepared, prepare
from benchmarks.machine import Ceilings, dtype_name
from benchmarks.memory import peak_extra
from benchmarks.registry import (
    FORWARD,
    Benchmark,
    Case,
    Cost,
    Peer,
    Problem,
    Reference,
    UnavailableError,
)
from benchmarks.timing import Spread, Timer, interleave

OK = "ok"
WRONG = "wrong result"
FAILED = "failed"
LEFT_OUT = "left out"  # a case that the peer does not have


@dataclass(frozen=True)
class Settings:
    """How long and how to measure."""

    device: torch.device
    timer: Timer
    seconds: float = 5.0
    min_rounds: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """One peer on one case: times are seconds per call, `speedup` is against the first peer."""

    op: str
    mode: str
    dtype: str
    case: str
    sizes: dict[str, int]
    peer: str
    baseline: bool  # the peer that the speed-up is over
    status: str
    cost: Cost
    floor: float  # seconds: bytes at the copy's bandwidth or operations at the GEMM's speed
    error: float | None = None
    message: str = ""
    seconds: Spread | None = None
    speedup: Spread | None = None
    rounds: int = 0
    repetitions: int = 0
    peak: int | None = None  # bytes in use at most during a step, beyond its gradients

    @property
    def gbs(self) -> float | None:
        """The floor's bytes over the median time, in GB/s."""
        return self.cost.bytes / self.seconds.median / 1e9 if self.seconds else None

    @property
    def gflops(self) -> float | None:
        """The floor's operations over the median time, in GFLOP/s."""
        return self.cost.flops / self.seconds.median / 1e9 if self.seconds else None

    @property
    def of_ceiling(self) -> float | None:
        """Share of the measured ceiling: 1 where the median time is the floor."""
        return self.floor / self.seconds.median if self.seconds else None


@dataclass(frozen=True)
class _Attempt:
    status: str
    prepared: Prepared | None = None
    message: str = ""

    @property
    def error(self) -> float | None:
        return self.prepared.error if self.prepared else None


def available(peers: Sequence[Peer], problem: Problem) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can be built here, and the reason for each that cannot."""
    able, missing = [], {}
    for peer in peers:
        try:
            peer.build(problem)
            able.append(peer)
        except UnavailableError as reason:
            missing[peer.name] = str(reason)
    return able, missing


def run_case(
    benchmark: Benchmark,
    case: Case,
    dtype: torch.dtype,
    peers: Sequence[Peer],
    modes: Sequence[str],
    settings: Settings,
    ceilings: Ceilings,
    say: Callable[[str], None],
) -> list[Result]:
    """Measure `peers` on one case in every mode; what was checked is told to `say`."""
    rng = torch.Generator(settings.device).manual_seed(settings.seed)
    try:
        problem = benchmark.make(case, dtype, settings.device, rng)
        with torch.enable_grad():
            truth = benchmark.reference(problem)
    except torch.OutOfMemoryError:
        say(f"!!! {benchmark.op} {dtype_name(dtype)} {case}: left out, too large for this GPU")
        return []
    results = []
    for mode in modes:
        where = f"{benchmark.op} {mode} {dtype_name(dtype)} {case}"
        allowed = benchmark.tolerance[dtype]
        with torch.set_grad_enabled(mode != FORWARD):
            attempts = {}
            for peer in peers:
                attempts[peer.name] = _attempt(peer, problem, mode, truth, allowed)
                say(_checked(where, peer.name, attempts[peer.name], allowed))
            steps = {
                n: a.prepared.step for n, a in attempts.items() if a.prepared and a.status == OK
            }
            measured = None
            if steps:
                measured = interleave(
                    steps,
                    timer=settings.timer,
                    seconds=settings.seconds,
                    min_rounds=settings.min_rounds,
                    seed=settings.seed,
                )
            gradients = 0
            if mode != FORWARD:
                gradients = sum(problem.args[i].nbytes for i in problem.wrt)
            peaks = {
                name: peak_extra(step, settings.device, gradients)
                for name, step in steps.items()
                if benchmark.memory
            }
        cost = benchmark.cost(case, dtype, mode)
        floor = max(cost.bytes / ceilings.copy, cost.flops / ceilings.gemm_for(dtype))
        baseline = peers[0].name
        for name, attempt in attempts.items():
            if attempt.status == LEFT_OUT:
                continue
            timed = measured if name in steps else None
            compared = timed if baseline in steps else None
            results.append(
                Result(
                    op=benchmark.op,
                    mode=mode,
                    dtype=dtype_name(dtype),
                    case=str(case),
                    sizes=case.sizes,
                    peer=name,
                    baseline=name == baseline,
                    status=attempt.status,
                    cost=cost,
                    floor=floor,
                    error=attempt.error,
                    message=attempt.message,
                    seconds=timed.seconds(name) if timed else None,
                    speedup=compared.speedup(name, baseline) if compared else None,
                    rounds=timed.rounds if timed else 0,
                    repetitions=timed.repetitions[name] if timed else 0,
                    peak=peaks.get(name),
                )
            )
    return results


def _attempt(peer: Peer, problem: Problem, mode: str, truth: Reference, allowed: float) -> _Attempt:
    try:
        prepared = prepare(peer.build(problem), problem, mode, truth, peer.overwrites)
    except UnavailableError as reason:
        return _Attempt(LEFT_OUT, message=str(reason))
    except (
        RuntimeError
    ) as failure:  # what torch raises for an unsupported dtype or too little memory
        return _Attempt(FAILED, message=str(failure).strip().splitlines()[0])
    # Written so that a NaN is wrong.
    return _Attempt(OK if prepared.error <= allowed else WRONG, prepared)


def _checked(where: str, peer: str, attempt: _Attempt, allowed: float) -> str:
    if attempt.status == FAILED:
        return f"!!! {where}: {peer} FAILED and is not timed: {attempt.message}"
    if attempt.status == LEFT_OUT:
        return f"    {where}: {peer} is not measured: {attempt.message}"
    if attempt.status == WRONG:
        return (
            f"!!! {where}: {peer} is WRONG and is not timed: error {attempt.error:.1e} against the "
            f"float64 reference, allowed {allowed:.0e}"
        )
    return f"    {where}: {peer} checked, error {attempt.error:.1e} (allowed {allowed:.0e})"
