"""The script that a GPU machine runs unattended, as far as it runs without one."""

import csv
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import make_parser, make_plan
from benchmarks.registry import discover
from tools import gpu_session
from tools.gpu_session import STAGES, Stage, run_stage, run_stages

BENCHES = [
    command.replace("{case}", "1").removeprefix("env SEQKERN_LSTM_EXCHANGE=flags ")
    for stage in STAGES
    for command in stage.commands
    if " -m benchmarks " in command
]


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
    )
    rows = run_stage(stage, tmp_path, 1.5)
    assert [code for _, _, code, _ in rows] == [3, 127, 124, 124]
    log = (tmp_path / "trial.log").read_text()
    assert "1\nexit 3" in log
    assert "no-such-program" in log


TELLS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("so far: 7")
"""
DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("program", "told"), [(TELLS, True), (DEAF, False)])
def test_out_of_time_a_command_tells_what_it_has_and_leaves_nothing_running(
    program, told, tmp_path, monkeypatch
):
    monkeypatch.setattr(gpu_session, "INTERRUPT_SECONDS", 1.0)
    log = tmp_path / "log"
    command = shlex.join([sys.executable, "-c", program])
    code, seconds = gpu_session.run(command, log, 1.5)
    assert code == 124
    assert seconds < 6
    text = log.read_text()
    assert ("so far: 7\n" in text) == told
    child = int(re.search(r"^child (\d+)", text, re.MULTILINE)[1])
    deadline = time.monotonic() + 5
    while alive(child):
        assert time.monotonic() < deadline, "what the command had started still runs"
        time.sleep(0.05)


def test_started_in_the_background_its_commands_hear_interrupts(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code, seconds = gpu_session.run("sleep 60", tmp_path / "log", 1.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 124
    assert seconds < gpu_session.INTERRUPT_SECONDS


def alive(pid: int) -> bool:
    """A process that has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_limited_time_is_shared_and_what_is_left_goes_on(tmp_path, capsys):
    wait = f"{shlex.quote(sys.executable)} -c 'import time; time.sleep(60)'"
    stages = (
        Stage("quick", "leaves its time to the next", ("true",), share=8.0),
        Stage("long", "gets half of the rest", (wait,)),
        Stage("told", "how long a case takes", ("echo {case}", wait)),
    )
    rows = run_stages(stages, tmp_path, minutes=3 / 60)
    assert [code for _, _, code, _ in rows] == [0, 124, 0, 124]
    assert 1.0 < rows[1][3] < 1.8
    assert sum(seconds for *_, seconds in rows) < 4
    assert "0.3\nexit 0" in (tmp_path / "told.log").read_text()


def test_a_summary_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_session, "STAGES", (Stage("one", "quick", ("true", "false")),))
    assert gpu_session.main(["--out", str(tmp_path)]) == 1
    rows = list(csv.reader((tmp_path / "summary.csv").open()))
    assert [row[:3] for row in rows] == [
        ["stage", "command", "exit"],
        ["one", "true", "0"],
        ["one", "false", "1"],
    ]


def test_time_must_be_there():
    done = subprocess.run(
        [sys.executable, "tools/gpu_session.py", "--minutes", "0"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "argument --minutes: must be above 0, got 0" in done.stderr


def test_unknown_stages_are_refused():
    done = subprocess.run(
        [sys.executable, "tools/gpu_session.py", "warp"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "argument STAGE: must be one of build, ceilings, test" in done.stderr


def test_all_benchmarks_by_one_name(capsys):
    assert gpu_session.main(["--list", "ceilings", "bench"]) == 0
    names = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line[0] != " "]
    benches = [stage.name for stage in STAGES if stage.name.startswith("bench-")]
    assert len(benches) == 6
    assert names == ["ceilings", *benches]


@pytest.mark.parametrize(
    ("told", "expected"),
    [("9.0\n9.0\n", "90a-real"), ("8.6\n", "86-real"), ("", "native"), ("[N/A]\n", "native")],
)
def test_the_gpus_own_architecture(told, expected, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{told}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_session.architecture() == expected


def test_without_a_driver_cmake_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_session.architecture() == "native"


def test_what_went_wrong_is_printed(tmp_path, capsys):
    lines = [
        "[gw1] [ 3%] FAILED tests/ops/test_a.py::test_b[cuda]",
        "[gw0] PASSED tests/ops/test_c.py",
    ]
    lines += [f"!!! op {i}: WRONG" for i in range(40)] + ["a.cu(3): error: no such thing"]
    program = f"print({chr(10).join(lines)!r})"
    run_stage(Stage("trial", "", (shlex.join([sys.executable, "-c", program]),)), tmp_path, 20)
    out = capsys.readouterr().out
    assert "test_b[cuda]" in out
    assert "PASSED" not in out.split("\n", 1)[1]
    assert "!!! op 28: WRONG" in out
    assert "... 12 more" in out
