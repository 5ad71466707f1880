"""`python -m benchmarks`: listing, one line for wrong arguments, and a whole small run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import __main__ as cli
from benchmarks.bench_cross_entropy import BENCHMARK
from benchmarks.registry import Benchmark, Case, Peer

ROOT = Path(__file__).parents[2]


def own(logits: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(logits, 1), target)


def off_by_one(logits: Tensor, target: Tensor) -> Tensor:
    return own(logits, target) + 1


def small(peer: Peer) -> dict[str, Benchmark]:
    cases = (Case(N=3, V=5), Case(N=2, V=70))
    torch_peer = Peer("torch", lambda problem: F.cross_entropy, note="is the baseline")
    benchmark = Benchmark(
        op="small",
        axes="N x V",
        cases=(*cases, Case(N=1, V=2)),
        quick=cases,
        make=BENCHMARK.make,
        reference=BENCHMARK.reference,
        cost=BENCHMARK.cost,
        peers=(torch_peer, peer, Peer("asked for", lambda problem: own, optional=True)),
    )
    return {"small": benchmark}


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings = cli.Ceilings(copy=1e10, read=1e10, gemm={"float32": 1e11})
    monkeypatch.setattr(cli, "measure_ceilings", lambda device: ceilings)


def test_list_names_every_op_with_its_cases_and_peers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert "cross_entropy\n" in out
    assert "2048x50257, 4096x32064, 16384x512" in out
    assert "torch, seqkern, torch.compile (only by --peers), liger" in out
    assert "forward, forward+backward" in out


def test_list_of_one_op(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {**small(Peer("own", lambda problem: own)), "cross_entropy": BENCHMARK}
    monkeypatch.setattr(cli, "discover", lambda: both)
    cli.main(["small", "--list"])
    assert capsys.readouterr().out.splitlines()[:2] == ["small", "  cases N x V: 3x5, 2x70, 1x2"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nosuch"], "unknown op 'nosuch'; there are: "),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--dtype", "int8"], "argument --dtype: must be one of fp32, "),
        (["--threads", "0"], "argument --threads: must be a positive integer, got '0'"),
        (["--threads", "two"], "argument --threads: must be a positive integer, got 'two'"),
        (["--seconds-per-case", "-1"], "must be a positive number of seconds, got '-1'"),
        (["--seconds-per-case", "nan"], "must be a positive number of seconds, got 'nan'"),
        (["--seconds-per-case", "soon"], "must be a positive number of seconds, got 'soon'"),
        (["cross_entropy", "--peers", "tensorflow"], "--peers: cross_entropy has torch, seqkern"),
        (["cross_entropy", "--cases", "3x3"], "--cases: cross_entropy has 1x16, "),
        (["--out", __file__], "is not a folder"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_arguments_are_one_line_and_code_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("benchmarks: ")
    assert captured.err.count("\n") == 1
    assert expected in captured.err


def test_cuda_without_a_gpu_is_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "benchmarks: argument --device: cuda is not available to this torch\n"
    )


def test_dtype_that_an_op_does_not_have(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only = replace(BENCHMARK, more_dtypes=())
    monkeypatch.setattr(cli, "discover", lambda: {"cross_entropy": only})
    with pytest.raises(SystemExit):
        cli.main(["--dtype", "fp64"])
    assert "cross_entropy has float32, bfloat16, got float64" in capsys.readouterr().err


def test_whole_run_prints_tables_and_writes_csv_json_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "discover", lambda: small(Peer("own", lambda problem: own)))
    options = ["--quick", "--seconds-per-case", "0.01", "--dtype", "fp32", "--out", str(tmp_path)]
    assert cli.main(options) == 0
    out = capsys.readouterr().out
    assert "small forward+backward float32 2x70: own checked, error" in out
    assert "small: torch is the baseline" in out
    assert "asked for" not in out
    files = sorted(path.name for path in tmp_path.glob("*/*"))
    assert files == [
        f"small-{mode}-float32.{ending}"
        for mode in ("forward+backward", "forward")
        for ending in ("csv", "json", "png")
    ]
    content = json.loads(next(tmp_path.glob("*/small-forward-float32.json")).read_text())
    found = [(r["case"], r["peer"], r["status"]) for r in content["results"]]
    assert found == [(c, p, "ok") for c in ("3x5", "2x70") for p in ("torch", "own")]
    assert content["settings"]["quick"] is True
    assert content["machine"]["ceilings"]["copy"] == 1e10


def test_partial_run_without_out_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "discover", lambda: small(Peer("own", lambda problem: own)))
    monkeypatch.setattr(cli, "RESULTS", tmp_path)
    options = ["--cases", "1x2", "--peers", "torch,asked for", "--seconds-per-case", "0.01"]
    assert cli.main(options) == 0
    assert not list(tmp_path.iterdir())


def test_whole_run_without_out_is_kept_in_the_results_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "discover", lambda: small(Peer("own", lambda problem: own)))
    monkeypatch.setattr(cli, "RESULTS", tmp_path)
    assert cli.main(["small", "--dtype", "fp64", "--seconds-per-case", "0.01"]) == 0
    assert len(list(tmp_path.glob("*/small-*-float64.csv"))) == 2


@pytest.mark.parametrize("with_out", [True, False])
def test_interrupted_run_leaves_the_cases_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_out: bool
) -> None:
    """Where --out says so; in the results folder it would replace a whole run."""
    real = cli.run_case

    def interrupted(*args: Any) -> list[Any]:
        if str(args[1]) == "2x70":
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(cli, "discover", lambda: small(Peer("own", lambda problem: own)))
    monkeypatch.setattr(cli, "run_case", interrupted)
    monkeypatch.setattr(cli, "RESULTS", tmp_path / "results")
    options = ["small", "--seconds-per-case", "0.01", "--dtype", "fp32"]
    with pytest.raises(KeyboardInterrupt):
        cli.main([*options, "--out", str(tmp_path / "out")] if with_out else options)
    if not with_out:
        assert not list(tmp_path.iterdir())
        return
    content = json.loads(next(tmp_path.glob("out/*/small-forward-float32.json")).read_text())
    assert [(r["case"], r["peer"]) for r in content["results"]] == [
        ("3x5", "torch"),
        ("3x5", "own"),
    ]
    assert content["settings"]["whole"] is False
    assert len(list(tmp_path.glob("out/*/*.csv"))) == 2


def test_wrong_result_ends_in_code_1_and_is_in_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "discover", lambda: small(Peer("own", lambda problem: off_by_one)))
    options = ["--quick", "--seconds-per-case", "0.01", "--dtype", "fp32", "--out", str(tmp_path)]
    assert cli.main(options) == 1
    captured = capsys.readouterr()
    assert "own is WRONG and is not timed" in captured.out
    assert captured.err.startswith("!!!")
    assert "wrong result" in next(tmp_path.glob("*/small-forward-float32.csv")).read_text()


def test_threads_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(cli, "discover", lambda: small(Peer("own", lambda problem: own)))
    cli.main(["--quick", "--threads", "1", "--dtype", "fp32", "--seconds-per-case", "0.01"])
    assert chosen == [1]


def test_module_is_run_by_python() -> None:
    command = [sys.executable, "-m", "benchmarks", "nosuch"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("benchmarks: unknown op 'nosuch'")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("device", "quick", "expected"),
    [
        ("cpu", False, ["3x5", "2x70", "1x2"]),
        ("cuda", False, ["3x5", "2x70", "1x2", "9x9"]),
        ("cuda", True, ["3x5", "2x70"]),
    ],
)
def test_large_cases_are_for_the_gpu(device: str, quick: bool, expected: list[str]) -> None:
    benchmark = small(Peer("own", lambda problem: own))["small"]
    benchmark = replace(benchmark, cuda_cases=(Case(N=9, V=9),))
    parser = cli.make_parser()
    options = parser.parse_args(["--device", device, *(["--quick"] if quick else [])])
    plan = cli.make_plan(benchmark, options, parser)
    assert [str(case) for case in plan.cases] == expected
