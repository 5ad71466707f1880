"""The script that a GPU machine runs unattended, as far as it runs without one."""

import csv
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import make_parser, make_plan
from benchmarks.registry import discover
from tools import gpu_session
from tools.gpu_session import STAGES, Stage, run_stage

BENCHES = [c for stage in STAGES for c in stage.commands if " -m benchmarks " in c]


@pytest.mark.parametrize("command", BENCHES)
def test_benchmark_commands_are_understood(command):
    """Ops, dtypes and peers exist; a wrong one would end the stage on the device."""
    words = shlex.split(command)
    assert words[:3] == [sys.executable, "-m", "benchmarks"]
    parser = make_parser()
    options = parser.parse_args(words[3:])
    plan = make_plan(discover()[options.ops[0]], options, parser)
    assert set(plan.benchmark.cuda_cases) <= set(plan.cases)


def test_every_op_that_has_a_benchmark_is_measured():
    measured = {shlex.split(command)[3] for command in BENCHES}
    files = {path.stem.removeprefix("bench_") for path in Path("benchmarks").glob("bench_*.py")}
    assert files == measured


def test_a_command_that_fails_stops_no_other(tmp_path, capsys):
    python = shlex.quote(sys.executable)
    stage = Stage(
        "trial",
        "three ends",
        (
            f"{python} -c 'print(1); raise SystemExit(3)'",
            "no-such-program",
            f"{python} -c 'import time; time.sleep(60)'",
            f"{python} -c 'print(2)'",
        ),
        seconds=1.5,
    )
    rows = run_stage(stage, tmp_path)
    assert [code for _, _, code, _ in rows] == [3, 127, 124, 124]
    log = (tmp_path / "trial.log").read_text()
    assert "1\nexit 3" in log
    assert "no-such-program" in log


def test_a_summary_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_session, "STAGES", (Stage("one", "quick", ("true", "false")),))
    assert gpu_session.main(["--out", str(tmp_path)]) == 1
    rows = list(csv.reader((tmp_path / "summary.csv").open()))
    assert [row[:3] for row in rows] == [
        ["stage", "command", "exit"],
        ["one", "true", "0"],
        ["one", "false", "1"],
    ]


def test_unknown_stages_are_refused():
    done = subprocess.run(
        [sys.executable, "tools/gpu_session.py", "warp"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "argument STAGE: must be one of build, ceilings, test" in done.stderr
