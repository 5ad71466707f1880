"""Peers are checked before they are timed, and what is timed is what was checked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.bench_cross_entropy import BENCHMARK
from benchmarks.check import prepare, relative_error
from benchmarks.machine import Ceilings
from benchmarks.registry import (
    FORWARD,
    FORWARD_BACKWARD,
    Benchmark,
    Case,
    Cost,
    Forward,
    Peer,
    Problem,
    Reference,
    UnavailableError,
    by_autograd,
    discover,
    need,
)
from benchmarks.runner import FAILED, OK, WRONG, Result, Settings, available, run_case
from benchmarks.timing import WallTimer

CEILINGS = Ceilings(copy=2e9, read=3e9, gemm={"float32": 4e9})


def square(x: Tensor) -> tuple[Tensor, Tensor]:
    return x * x, x.sum(1)  # [N, M], [N]


def make(case: Case, dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> Problem:
    shape = case["N"], case["M"]
    x, dy = (torch.randn(shape, generator=rng).to(dtype) for _ in range(2))
    return Problem((x,), upstream=(dy, torch.randn(case["N"], generator=rng)))


def toy(*peers: Peer) -> Benchmark:
    return Benchmark(
        op="toy",
        axes="N x M",
        cases=(Case(N=5, M=7),),
        quick=(Case(N=2, M=3),),
        make=make,
        reference=by_autograd(square),
        cost=lambda case, dtype, mode: Cost(bytes=8 * case["N"] * case["M"], flops=140),
        peers=peers,
    )


def measure(*peers: Peer, dtype: torch.dtype = torch.float32) -> tuple[list[Result], list[str]]:
    benchmark, said = toy(*peers), list[str]()
    settings = Settings(torch.device("cpu"), WallTimer(), seconds=0.01)
    results = run_case(
        benchmark, Case(N=5, M=7), dtype, peers, benchmark.modes, settings, CEILINGS, said.append
    )
    return results, said


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_relative_error_does_not_depend_on_scale(scale: float) -> None:
    truth = torch.tensor([4.0, -2.0, 1.0], dtype=torch.float64) * scale
    result = (truth + torch.tensor([0.0, 0.0, 0.4]) * scale).float()
    assert relative_error(result, truth) == pytest.approx(0.1)


def test_relative_error_sees_small_entries_that_are_all_wrong() -> None:
    truth = torch.full((1001,), 1e-3, dtype=torch.float64)
    truth[0] = 1
    result = torch.zeros_like(truth)
    result[0] = 1
    assert relative_error(result, truth) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "result",
    [torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf]), torch.tensor([1.0])],
    ids=["nan", "inf", "shape"],
)
def test_relative_error_of_no_number_and_of_another_shape_is_infinite(result: Tensor) -> None:
    assert relative_error(result, torch.tensor([1.0, 2.0], dtype=torch.float64)) == float("inf")


@pytest.mark.parametrize("place", [0, 99, 100, 249])
def test_relative_error_looks_at_every_chunk(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.check._CHUNK", 100)
    truth = torch.ones(25, 10, dtype=torch.float64)
    result = truth.clone()
    result.view(-1)[place] += 0.5
    before = result.clone()
    assert relative_error(result, truth) == 0.5
    assert torch.equal(result, before)


def test_relative_error_where_the_truth_is_zero_is_absolute() -> None:
    zeros = torch.zeros(2, dtype=torch.float64)
    assert relative_error(torch.tensor([0.0, 0.25], dtype=torch.float64), zeros) == 0.25


def test_forward_step_runs_without_and_backward_step_with_fresh_gradients() -> None:
    x = torch.randn(3, 4)
    problem = Problem((x,), upstream=(torch.randn(3, 4), torch.randn(3)))
    truth = by_autograd(square)(problem)
    leaves: list[Tensor] = []

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        leaves.append(x)
        return square(x)

    prepared = prepare(forward, problem, FORWARD_BACKWARD, truth, copy=False)
    assert prepared.error < 1e-6
    seen: list[Tensor] = []
    leaves[0].register_hook(lambda grad: seen.append(grad.clone()))
    prepared.step()
    prepared.step()
    assert leaves[0].grad is None
    torch.testing.assert_close(seen, [truth.grads[0].float()] * 2)
    assert not problem.args[0].requires_grad


@pytest.mark.parametrize("copy", [True, False])
def test_peer_that_overwrites_gets_inputs_of_its_own(copy: bool) -> None:
    problem = Problem((torch.ones(2, 3),))
    truth = by_autograd(lambda x: x.sum())(problem)

    def forward(x: Tensor) -> Tensor:
        return x.zero_().sum() + 6

    prepare(forward, problem, FORWARD, truth, copy=copy)
    assert bool(problem.args[0].eq(1).all()) is copy


def test_correct_peers_are_timed_in_every_mode() -> None:
    results, said = measure(Peer("a", lambda p: square), Peer("b", lambda p: square))
    found = [(r.mode, r.peer, r.status) for r in results]
    assert found == [(m, p, OK) for m in (FORWARD, FORWARD_BACKWARD) for p in ("a", "b")]
    assert all(r.seconds and r.seconds.minimum > 0 and r.speedup and r.rounds >= 3 for r in results)
    assert [r.baseline for r in results] == [True, False, True, False]
    assert len(said) == 4
    assert "toy forward float32 5x7: a checked, error" in said[0]


def test_forward_alone_runs_without_autograd_and_the_other_mode_with_it() -> None:
    enabled: list[bool] = []

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        enabled.append(torch.is_grad_enabled())
        return square(x)

    results, _ = measure(Peer("a", lambda p: forward))
    assert [r.status for r in results] == [OK, OK]
    first = enabled.index(True)
    assert first > 3
    assert all(enabled[first:])


def test_floor_is_the_slower_of_moving_and_computing() -> None:
    result = measure(Peer("a", lambda p: square))[0][0]
    assert result.floor == max(8 * 35 / 2e9, 140 / 4e9)
    assert result.seconds is not None
    assert result.gbs == pytest.approx(280e-9 / result.seconds.median)
    assert result.gflops == pytest.approx(140e-9 / result.seconds.median)
    assert result.of_ceiling == pytest.approx(result.floor / result.seconds.median)


def wrong_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.detach() * x, x.sum(1)


def no_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.detach() * x + x.sum() * 0, x.sum(1) + torch.nan


@pytest.mark.parametrize(("bad", "wrong_in"), [(wrong_gradient, 1), (no_gradient, 2)])
def test_wrong_peer_is_reported_and_not_timed(bad: Forward, wrong_in: int) -> None:
    results, said = measure(Peer("good", lambda p: square), Peer("bad", lambda p: bad))
    wrong = [r for r in results if r.status == WRONG]
    assert [r.peer for r in wrong] == ["bad"] * wrong_in
    assert wrong[-1].mode == FORWARD_BACKWARD
    assert all(r.seconds is None and r.speedup is None for r in wrong)
    assert sum(line.startswith("!!!") and "bad is WRONG" in line for line in said) == wrong_in


def test_without_a_correct_baseline_there_is_time_but_no_ratio() -> None:
    results, _ = measure(Peer("bad", lambda p: no_gradient), Peer("good", lambda p: square))
    good = [r for r in results if r.peer == "good"]
    assert all(r.seconds and r.speedup is None for r in good)


def test_failing_peer_is_reported_and_the_others_are_timed() -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("not implemented for 'Float'\nand more")

    results, said = measure(Peer("good", lambda p: square), Peer("fails", lambda p: fails))
    assert [r.status for r in results] == [OK, FAILED, OK, FAILED]
    assert results[1].message == "not implemented for 'Float'"
    assert "!!! toy forward float32 5x7: fails FAILED" in said[1]


def test_case_that_does_not_fit_is_left_out_with_a_line() -> None:
    def too_large(problem: Problem) -> Reference:
        raise torch.OutOfMemoryError("CUDA out of memory")

    benchmark = replace(toy(), reference=too_large)
    settings, said = Settings(torch.device("cpu"), WallTimer()), list[str]()
    case, modes = benchmark.cases[0], benchmark.modes
    results = run_case(benchmark, case, torch.float32, [], modes, settings, CEILINGS, said.append)
    assert results == []
    assert said == ["!!! toy float32 5x7: left out, too large for this GPU"]


def test_peer_that_is_not_installed_is_left_out_with_its_reason() -> None:
    def missing(problem: Problem) -> Forward:
        raise UnavailableError("not for this device")

    here = Peer("here", lambda p: square)
    absent = Peer("absent", lambda p: need("no_such_module_anywhere").forward)
    peers, reasons = available([Peer("missing", missing), here, absent], Problem((torch.ones(1),)))
    assert peers == [here]
    assert reasons["missing"] == "not for this device"
    assert "No module named 'no_such_module_anywhere'" in reasons["absent"]


def test_benchmarks_are_found_by_file_name() -> None:
    assert discover()["cross_entropy"] is BENCHMARK


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [Case(N=1, V=16), Case(N=37, V=50), Case(N=3, V=5025)], ids=str)
def test_cross_entropy_reference_agrees_with_autograd(case: Case, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(1)
    problem = BENCHMARK.make(case, dtype, torch.device("cpu"), rng)
    ours, theirs = BENCHMARK.reference(problem), by_autograd(F.cross_entropy)(problem)
    torch.testing.assert_close(ours.outputs, theirs.outputs)
    torch.testing.assert_close(ours.grads, theirs.grads)


def test_cross_entropy_reference_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.bench_cross_entropy.CHUNK", 100)
    rng = torch.Generator().manual_seed(1)
    problem = BENCHMARK.make(Case(N=11, V=33), torch.float32, torch.device("cpu"), rng)
    ours, theirs = BENCHMARK.reference(problem), by_autograd(F.cross_entropy)(problem)
    torch.testing.assert_close(ours.outputs, theirs.outputs)
    torch.testing.assert_close(ours.grads, theirs.grads)


def test_cross_entropy_floor_is_one_read_and_then_two_reads_and_a_write() -> None:
    case = Case(N=10, V=100)
    assert BENCHMARK.cost(case, torch.float32, FORWARD).bytes == 4000
    assert BENCHMARK.cost(case, torch.bfloat16, FORWARD_BACKWARD).bytes == 6000


def test_a_peer_may_leave_a_case_out() -> None:
    def build(problem: Problem) -> Forward:
        raise UnavailableError("has no window")

    results, said = measure(Peer("here", lambda p: square), Peer("narrow", build))
    assert [r.peer for r in results] == ["here", "here"]
    assert "toy forward float32 5x7: narrow is not measured: has no window" in said[1]
