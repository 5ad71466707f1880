"""Compare callables fairly on a machine that is never quite quiet.

All callables are timed in turn, round after round, so that a slow minute of the machine hits each
of them, and ratios are taken inside a round before the median over the rounds is. A round's order
is shuffled: always running second, in caches and pages the first one left, would be a bias.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Call = Callable[[], object]


class Timer(Protocol):
    """How a sample is taken (`sample`), and the time that budgets are kept in (`now`)."""

    max_repetitions: int

    def now(self) -> float:
        """Seconds of wall time since some fixed moment."""

    def sample(self, call: Call, repetitions: int) -> float:
        """Mean seconds of one call, over `repetitions` calls."""


@dataclass
class WallTimer:
    """Wall time of calls that have finished when they return (CPU)."""

    clock: Callable[[], float] = time.perf_counter
    max_repetitions: int = 100_000

    def now(self) -> float:
        """Seconds by `clock`."""
        return self.clock()

    def sample(self, call: Call, repetitions: int) -> float:
        """Mean seconds of one call; the results are freed inside the time, as in a program."""
        start = self.clock()
        for _ in range(repetitions):
            call()
        return (self.clock() - start) / repetitions


class Event(Protocol):
    """The part of torch.cuda.Event that is used."""

    def record(self) -> None:
        """Note the time when the stream gets here."""

    def elapsed_time(self, end: Event, /) -> float:
        """Milliseconds from this event to `end`."""


def _cuda_event() -> Event:
    factory: Any = torch.cuda.Event  # untyped in torch
    event: Event = factory(enable_timing=True)
    return event


def l2_flush(device: torch.device) -> Call:
    """A call that reads a buffer of four times the GPU's L2 cache, at least 256 MiB.

    One that writes would leave the cache to be written back, which the call that is timed then
    waits for.
    """
    size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 256 << 20)
    return torch.zeros(size // 4, device=device).sum


@dataclass
class CudaTimer:
    """Stream time between two CUDA events around each call, with a cold L2 before each.

    Nothing waits for the GPU between calls: the flush keeps it busy while the host enqueues what
    comes next, so launch cost shows only where a call's own kernels cannot hide it.
    """

    flush: Call
    event: Callable[[], Event] = _cuda_event
    synchronize: Callable[[], None] = torch.cuda.synchronize
    clock: Callable[[], float] = time.perf_counter
    max_repetitions: int = 200

    def now(self) -> float:
        """Seconds by `clock`."""
        return self.clock()

    def sample(self, call: Call, repetitions: int) -> float:
        """Mean seconds of one call between its events; one synchronisation, after the last."""
        pairs = [(self.event(), self.event()) for _ in range(repetitions)]
        for start, end in pairs:
            self.flush()
            start.record()
            call()
            end.record()
        self.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / repetitions / 1e3


def timer_for(device: torch.device) -> Timer:
    """The timer of a device: wall time on the CPU, events on a GPU."""
    return CudaTimer(l2_flush(device)) if device.type == "cuda" else WallTimer()


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and minimum of some numbers."""

    median: float
    q1: float
    q3: float
    minimum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3, min(values))

    @property
    def relative_iqr(self) -> float:
        """Distance of the quartiles as a share of the median."""
        return (self.q3 - self.q1) / self.median


@dataclass
class Measurement:
    """Samples of several callables taken in the same rounds: seconds per call, one per round."""

    repetitions: dict[str, int]
    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        """Number of rounds taken."""
        return len(next(iter(self.samples.values())))

    def seconds(self, name: str) -> Spread:
        """Seconds per call."""
        return Spread.of(self.samples[name])

    def speedup(self, name: str, baseline: str) -> Spread:
        """How many times faster than `baseline`: over rounds, of (its time / this one's time)."""
        pairs = zip(self.samples[baseline], self.samples[name], strict=True)
        return Spread.of([base / own for base, own in pairs])


def interleave(
    calls: Mapping[str, Call],
    *,
    timer: Timer,
    seconds: float = 5.0,
    min_sample: float = 0.01,
    min_rounds: int = 3,
    max_rounds: int = 60,
    warmup: float = 0.05,
    seed: int = 0,
) -> Measurement:
    """Time several callables in turn until `seconds` of wall time are spent on all together.

    Args:
        calls: what to time, by name.
        timer: takes the samples.
        seconds: wall-time budget, warm-up included; `min_rounds` are taken even beyond it.
        min_sample: a sample repeats a call until it lasts about this many seconds.
        min_rounds: least number of rounds, at least 1.
        max_rounds: rounds after which more would not narrow the median.
        warmup: each call is run for this many seconds first, at least once.
        seed: of the order inside the rounds.

    Raises:
        ValueError: nothing to time, or min_rounds is not in 1..max_rounds.
    """
    if not calls:
        raise ValueError("interleave: calls must name at least one callable, got none")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"interleave: min_rounds must be in 1..{max_rounds}, got {min_rounds}")
    begin = timer.now()
    repetitions = {name: _warm_up(call, timer, warmup, min_sample) for name, call in calls.items()}
    measured = Measurement(repetitions, {name: [] for name in calls})
    order = list(calls)
    rng = random.Random(seed)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        first = timer.now()
        for done in range(max_rounds):
            spent = timer.now() - first
            if done >= min_rounds and first - begin + spent * (done + 1) / done > seconds:
                break
            rng.shuffle(order)
            for name in order:
                measured.samples[name].append(timer.sample(calls[name], repetitions[name]))
    finally:
        if collecting:
            gc.enable()
    return measured


def _warm_up(call: Call, timer: Timer, warmup: float, min_sample: float) -> int:
    """Run `call` for `warmup` seconds; how often a sample has to repeat it.

    The fastest run counts: the first one pays for caches, page faults and lazy initialisation.
    """
    until = timer.now() + warmup
    fastest = timer.sample(call, 1)
    while timer.now() < until:
        fastest = min(fastest, timer.sample(call, 1))
    if fastest <= 0:
        return timer.max_repetitions
    return min(max(math.ceil(min_sample / fastest), 1), timer.max_repetitions)
