"""Tables, files and pictures of made-up results, and the facts of the machine."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from benchmarks import machine, report
from benchmarks.bench_cross_entropy import BENCHMARK
from benchmarks.machine import Ceilings, OtherLoad, describe, measure_ceilings
from benchmarks.plots import ticks, write_png
from benchmarks.registry import Cost
from benchmarks.runner import OK, WRONG, Result
from benchmarks.timing import Spread

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy=2e10, read=3e10, gemm={"float32": 1e11})
MACHINE: dict[str, Any] = {
    "title": "Some CPU, 2 threads",
    "versions": {"torch": "2.13.0"},
    "commit": "0123456789ab",
    "date": "2025-01-02T03:04:05+00:00",
}


def result(case: str, peer: str, seconds: float, speedup: float, baseline: bool) -> Result:
    N, V = map(int, case.split("x"))
    return Result(
        op="cross_entropy",
        mode="forward",
        dtype="float32",
        case=case,
        sizes={"N": N, "V": V},
        peer=peer,
        baseline=baseline,
        status=OK,
        cost=Cost(bytes=4 * N * V, flops=3 * N * V),
        floor=4 * N * V / CEILINGS.copy,
        error=1.5e-7,
        seconds=Spread(seconds, 0.9 * seconds, 1.2 * seconds, 0.8 * seconds),
        speedup=Spread(speedup, 0.95 * speedup, 1.05 * speedup, 0.9 * speedup),
        rounds=12,
        repetitions=3,
    )


RESULTS = [
    result("2048x50257", "torch", 0.358, 1, True),
    result("2048x50257", "seqkern", 0.0885, 4.05, False),
    result("1x16", "torch", 7.3e-6, 1, True),
    replace(
        result("1x16", "seqkern", 1, 1, False),
        status=WRONG,
        error=float("inf"),
        seconds=None,
        speedup=None,
        rounds=0,
        repetitions=0,
    ),
]


def test_table_shows_time_ratio_rate_and_share_of_the_ceiling() -> None:
    lines = [line.split() for line in report.table(RESULTS, "bytes").splitlines()]
    assert lines[0][-5:] == ["quartiles", "GB/s", "of", "ceiling", "error"]
    torch_row = ["2048x50257", "torch", "358", "ms", "30.0%", "1.00x", "1.15", "5.8%", "1.5e-07"]
    own_row = ["seqkern", "88.5", "ms", "30.0%", "4.05x", "3.85..4.25", "4.65", "23.3%", "1.5e-07"]
    assert lines[1] == torch_row
    assert lines[2] == own_row
    assert lines[4] == ["seqkern", "WRONG", "RESULT", "inf"]


def test_table_of_an_op_bound_by_arithmetic_shows_flops() -> None:
    lines = report.table(RESULTS, "flops").splitlines()
    assert "GFLOP/s" in lines[0]
    assert "0.863" in lines[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12.34, "12.3 s"),
        (1.0, "1.00 s"),
        (0.358, "358 ms"),
        (7.25e-6, "7.25 us"),
        (3e-8, "30.0 ns"),
    ],
)
def test_times_have_three_digits_in_a_fitting_unit(seconds: float, text: str) -> None:
    assert report.seconds_text(seconds) == text


def test_csv_has_a_line_per_result_with_machine_and_versions(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    report.write_csv(path, RESULTS, MACHINE)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["peer"]) for row in rows] == [(r.case, r.peer) for r in RESULTS]
    assert rows[0]["N"] == "2048"
    assert float(rows[1]["seconds_median"]) == 0.0885
    assert float(rows[1]["speedup_q3"]) == pytest.approx(4.05 * 1.05)
    assert rows[3]["status"] == "wrong result"
    assert rows[3]["seconds_median"] == ""
    assert {row["machine"] for row in rows} == {"Some CPU, 2 threads"}
    assert {row["torch"] for row in rows} == {"2.13.0"}


def test_json_holds_results_machine_and_settings_and_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    report.write_json(path, RESULTS, MACHINE, {"seed": 0})
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content["machine"] == MACHINE
    assert content["settings"] == {"seed": 0}
    assert content["results"][0]["gb_per_s"] == pytest.approx(1.15, rel=1e-2)
    assert content["results"][3]["relative_error"] is None


def test_picture_is_written_and_not_blank(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_png(path, BENCHMARK, RESULTS, MACHINE["title"], CEILINGS, 1e11)
    pixels = matplotlib.image.imread(path)  # [height, width, 4]
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 1000
    blue = (abs(pixels[..., :3] - [0, 0x72 / 255, 0xB2 / 255]) < 0.02).all(-1)
    assert blue.sum() > 500  # our bar and our dots


@pytest.mark.parametrize(
    ("low", "high", "places"),
    [
        (0.055, 0.09, [0.06, 0.08]),
        (0.02, 0.31, [0.02, 0.05, 0.1, 0.2]),
        (8e-6, 0.12, [1e-5, 1e-4, 1e-3, 1e-2, 0.1]),
        (130, 190, [140, 160, 180]),
        (100, 104, [100]),
        (1e-9, 1e9, [1e-9, 1e-5, 0.1, 1e3, 1e7]),
    ],
)
def test_ticks_are_few_and_round(low: float, high: float, places: list[float]) -> None:
    assert ticks(low, high) == places


def test_names_of_files() -> None:
    expected = "cross_entropy-forward+backward-bfloat16"
    assert report.stem(BENCHMARK, "forward+backward", "bfloat16") == expected


@pytest.mark.parametrize(
    ("dtype", "gemm", "expected"),
    [
        (torch.float32, {"float32": 1.0, "bfloat16": 2.0}, 1.0),
        (torch.bfloat16, {"float32": 1.0, "bfloat16": 2.0}, 2.0),
        (torch.float16, {"float32": 1.0, "bfloat16": 2.0}, 2.0),
        (torch.bfloat16, {"float32": 1.0}, 1.0),
        (torch.float16, {"float32": 1.0}, 1.0),
        (torch.float64, {"float32": 1.0, "bfloat16": 2.0}, 1.0),
    ],
)
def test_gemm_ceiling_of_a_dtype(
    dtype: torch.dtype, gemm: dict[str, float], expected: float
) -> None:
    assert Ceilings(1, 1, gemm).gemm_for(dtype) == expected


def test_ceilings_are_measured() -> None:
    ceilings = measure_ceilings(CPU, copy_bytes=1 << 20, gemm_size=64)
    assert ceilings.copy > 1e6
    assert ceilings.read > 1e6
    assert ceilings.gemm["float32"] > 1e6


def test_record_of_the_machine_is_complete_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQKERN_FORCE_ISA", "avx2")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    record: dict[str, Any] = json.loads(json.dumps(describe(CPU, CEILINGS)))
    assert record["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert record["cpu"]["threads"] == torch.get_num_threads()
    assert record["cpu"]["cores"] == os.cpu_count()
    assert record["environment"]["SEQKERN_FORCE_ISA"] == "avx2"
    assert "SECRET_TOKEN" not in record["environment"]
    assert record["ceilings"]["copy"] == 2e10
    assert record["gpu"] is None


def test_folders_of_the_machine_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only looked at, never started with: an unknown library would be an error of the loader.
    environment = {"LD_PRELOAD": "/opt/somewhere/libjemalloc.so.2", "CUDA_HOME": "/opt/cuda-13.2"}
    monkeypatch.setattr(machine.os, "environ", environment)
    monkeypatch.setattr(machine, "_output", lambda *command: None)
    record: dict[str, Any] = describe(CPU, CEILINGS)
    assert record["environment"] == {"LD_PRELOAD": "libjemalloc.so.2", "CUDA_HOME": "cuda-13.2"}
    assert record["commit"] is None


def test_folder_is_named_after_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cpu_model", lambda: "AMD EPYC(TM) 7B13")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert machine.folder_name(CPU) == "amd-epyc-tm-7b13-avx2-2-threads"


@pytest.mark.parametrize(
    ("busy", "own", "share"), [(10.0, 10.0, 0.0), (10.0, 4.0, 0.3), (4.0, 10.0, 0.0)]
)
def test_load_of_others_is_what_is_busy_beyond_this_process(
    busy: float, own: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter([(100.0, 50.0, 5.0), (110.0, 50.0 + busy, 5.0 + own)])
    monkeypatch.setattr(OtherLoad, "_now", lambda self: next(moments))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    assert OtherLoad().share() == pytest.approx(share)
