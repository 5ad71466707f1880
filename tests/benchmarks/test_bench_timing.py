"""The statistics of interleaved timing, on clocks that tell what the test says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from benchmarks.timing import CudaTimer, Measurement, Spread, WallTimer, interleave


@dataclass
class Machine:
    """A clock that only its own calls move, with a log of who was called."""

    seconds: float = 0.0
    log: list[str] = field(default_factory=list)

    def clock(self) -> float:
        return self.seconds

    def call(self, name: str, takes: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            self.seconds += takes()

        return run

    def timer(self) -> WallTimer:
        return WallTimer(clock=self.clock)


def test_times_and_ratio_of_steady_calls() -> None:
    machine = Machine()
    calls = {"slow": machine.call("slow", lambda: 0.03), "fast": machine.call("fast", lambda: 0.01)}
    measured = interleave(calls, timer=machine.timer(), seconds=2.0)
    assert measured.seconds("slow").median == pytest.approx(0.03)
    assert measured.seconds("fast").median == pytest.approx(0.01)
    assert measured.speedup("fast", "slow").median == pytest.approx(3)
    assert measured.speedup("slow", "slow") == Spread(1, 1, 1, 1)


def test_ratio_is_taken_inside_each_round() -> None:
    # A machine that gets slower and slower: the times spread, their ratio within a round does not.
    samples = {"a": [1.0, 10.0, 100.0, 1000.0], "b": [0.5, 5.0, 50.0, 500.0]}
    measured = Measurement({"a": 1, "b": 1}, samples)
    assert measured.speedup("b", "a") == Spread(2, 2, 2, 2)
    assert measured.seconds("a").q3 > 10 * measured.seconds("a").q1


def test_every_round_runs_every_call_once_in_changing_order() -> None:
    machine = Machine()
    names = ["a", "b", "c"]
    calls = {name: machine.call(name, lambda: 0.02) for name in names}
    measured = interleave(calls, timer=machine.timer(), seconds=100, max_rounds=20, warmup=0)
    rounds = [tuple(machine.log[i : i + 3]) for i in range(3, len(machine.log), 3)]
    assert measured.rounds == len(rounds) == 20
    assert {tuple(sorted(order)) for order in rounds} == {("a", "b", "c")}
    assert len({order[0] for order in rounds}) == 3


def test_order_is_fixed_by_the_seed() -> None:
    def order(seed: int) -> list[str]:
        machine = Machine()
        calls = {name: machine.call(name, lambda: 0.02) for name in "abcd"}
        interleave(calls, timer=machine.timer(), seconds=100, max_rounds=10, seed=seed)
        return machine.log

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize(
    ("takes", "repetitions"), [(1e-4, 100), (3e-3, 4), (0.01, 1), (0.5, 1), (0.0, 100_000)]
)
def test_short_calls_are_repeated_until_a_sample_is_long_enough(
    takes: float, repetitions: int
) -> None:
    machine = Machine()
    timer = machine.timer()
    calls = {"a": machine.call("a", lambda: takes)}
    measured = interleave(calls, timer=timer, min_sample=0.01, min_rounds=1, max_rounds=1, warmup=0)
    assert measured.repetitions == {"a": repetitions}
    assert measured.seconds("a").median == pytest.approx(takes)


def test_first_slow_call_does_not_count() -> None:
    machine = Machine()
    first = iter([5.0])
    calls = {"a": machine.call("a", lambda: next(first, 0.001))}
    measured = interleave(calls, timer=machine.timer(), seconds=0.2, warmup=6.0)
    assert measured.repetitions == {"a": 10}
    assert measured.seconds("a").q3 == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [(0.01, 3), (2.1, 9), (1000.0, 60)],
    ids=["least rounds", "budget", "most rounds"],
)
def test_budget_bounds_the_rounds(seconds: float, rounds: int) -> None:
    machine = Machine()
    calls = {name: machine.call(name, lambda: 0.1) for name in "ab"}
    measured = interleave(calls, timer=machine.timer(), seconds=seconds, warmup=0.05)
    assert measured.rounds == rounds
    if rounds != 3:
        assert machine.seconds <= seconds


def test_nothing_to_time_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one callable"):
        interleave({}, timer=WallTimer())


@pytest.mark.parametrize("rounds", [0, 61])
def test_number_of_rounds_is_checked(rounds: int) -> None:
    with pytest.raises(ValueError, match=f"min_rounds must be in 1..60, got {rounds}"):
        interleave({"a": lambda: None}, timer=WallTimer(), min_rounds=rounds)


def test_exception_of_a_call_leaves_garbage_collection_on() -> None:
    import gc

    calls_left = iter([None])

    def fails_the_second_time() -> None:
        next(calls_left)

    with pytest.raises(StopIteration):
        interleave({"a": fails_the_second_time}, timer=WallTimer(), warmup=0)
    assert gc.isenabled()


def test_spread() -> None:
    spread = Spread.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert spread == Spread(median=3, q1=2, q3=4, minimum=1)
    assert spread.relative_iqr == pytest.approx(2 / 3)
    assert Spread.of([7.0]) == Spread(7, 7, 7, 7)


@dataclass
class Stream:
    """A GPU's queue: work is done in order, events note the time when they are reached."""

    log: list[str] = field(default_factory=list)
    milliseconds: float = 0.0

    def enqueue(self, what: str, milliseconds: float) -> None:
        self.log.append(what)
        self.milliseconds += milliseconds


@dataclass
class FakeEvent:
    stream: Stream
    at: float = -1.0

    def record(self) -> None:
        self.stream.log.append("event")
        self.at = self.stream.milliseconds

    def elapsed_time(self, end: FakeEvent, /) -> float:
        assert self.stream.log[-1] == "synchronize"
        return end.at - self.at


def test_cuda_timer_leaves_the_flush_out_and_synchronises_once_at_the_end() -> None:
    stream = Stream()
    timer = CudaTimer(
        flush=lambda: stream.enqueue("flush", 50),
        event=lambda: FakeEvent(stream),
        synchronize=lambda: stream.log.append("synchronize"),
    )
    seconds = timer.sample(lambda: stream.enqueue("kernel", 2), repetitions=3)
    assert seconds == pytest.approx(0.002)
    assert stream.log == ["flush", "event", "kernel", "event"] * 3 + ["synchronize"]
