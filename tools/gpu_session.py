"""All that has to be seen on a GPU, unattended, in stages that each end within ten minutes.

    python tools/gpu_session.py --out DIR            every stage, in order
    python tools/gpu_session.py build test --out DIR some of them
    python tools/gpu_session.py --minutes 9 --out DIR    something of everything in that time
    python tools/gpu_session.py --list               what they run

Every command's output goes to DIR/<stage>.log, benchmark results to DIR/results, and a line per
command with its time and exit code to DIR/summary.csv. A command that fails or runs out of its
stage's time does not stop the others, and leaves what it has found so far: it is interrupted, and
killed with all that it started only if that does not end it. Exit code 1 if any failed. With
--minutes each stage gets its share of what is left, what the ones before did not use included, and
benchmarks take a third of a second per case.

Where one command may run for ten minutes only, call twice, with the stages of each:

    python tools/gpu_session.py build ceilings test memcheck racecheck --minutes 8 --out DIR
    python tools/gpu_session.py bench --minutes 6 --out DIR      every stage named bench-...

Needs what a CUDA machine for PyTorch has: torch with CUDA, nvcc, cmake, ninja, pybind11,
scikit-build-core and pytest in the interpreter that runs this.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGE_SECONDS = 570.0
INTERRUPT_SECONDS = 8.0
PYTHON = sys.executable


@dataclass(frozen=True)
class Stage:
    """Commands that run one after the other; `{out}` stands for the folder of results, `{case}` for
    the seconds that a case of a benchmark takes, `{architecture}` for the GPU's."""

    name: str
    why: str
    commands: tuple[str, ...]
    seconds: float = STAGE_SECONDS
    #: Of the time, beside the other stages', where all of it is limited.
    share: float = 1.0


def bench(op: str, options: str = "") -> str:
    """Of one op, kept; a second per case is enough for medians of GPU times."""
    return (
        f"{PYTHON} -m benchmarks {op} --device cuda --seconds-per-case {{case}} "
        f"--out {{out}}/results {options}"
    ).strip()


# PyTorch's caching allocator is off under the sanitizer, which could not tell tensors apart.
SANITIZED = "cuda and (matches_torch or strided)"


def sanitizer(tool: str) -> str:
    """The small-shape tests of all ops under one of compute-sanitizer's tools."""
    return (
        f"env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool {tool} --error-exitcode 9 "
        f'{PYTHON} -m pytest -q -x tests/ops -k "{SANITIZED}" -p no:xdist'
    )


STAGES = (
    Stage(
        "build",
        "from a clean tree, for this GPU alone, with what is installed",
        (
            "nvidia-smi",
            f"{PYTHON} -m pip install --no-build-isolation --no-deps -e . "
            "--config-settings=build-dir=build/gpu "
            "--config-settings=cmake.define.SEQKERN_CUDA=ON "
            "--config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES={architecture}",
            f"{PYTHON} -m seqkern doctor",
        ),
        share=5.0,
    ),
    Stage(
        "ceilings",
        "barriers; copy bandwidth and GEMM rates are measured by every benchmark run",
        (
            "nvcc -O3 -std=c++20 -arch=native benchmarks/gpu/barriers.cu -o {out}/barriers",
            "{out}/barriers",
        ),
        120.0,
        share=0.5,
    ),
    Stage(
        "test",
        "every op test on the device",
        (
            # The emulator's own tests are named after the kernels, too.
            f"{PYTHON} -m pytest -v tests --ignore tests/emulator -k cuda -n 8 --maxfail 60 "
            "--tb short",
        ),
        share=3.0,
    ),
    Stage(
        "memcheck",
        "reads and writes outside of tensors",
        (sanitizer("memcheck"),),
    ),
    Stage(
        "racecheck",
        "races in shared memory",
        (sanitizer("racecheck"),),
    ),
    Stage(
        "bench-loss",
        "cross-entropy with and without the head",
        (
            bench("cross_entropy", "--dtype bf16 --peers torch,seqkern,torch.compile,liger"),
            bench("cross_entropy_columns", "--dtype bf16"),
            bench("linear_cross_entropy", "--dtype bf16"),
            bench("log_softmax", "--dtype bf16"),
        ),
    ),
    Stage(
        "bench-attention",
        "forward and backward beside torch's backends",
        (bench("attention", "--dtype bf16"),),
    ),
    Stage(
        "bench-recurrent",
        "beside cuDNN",
        (
            bench("lstm", "--dtype fp16"),
            bench("lstm", "--dtype bf16"),
            bench("lstm"),
            bench("gru", "--dtype bf16"),
            bench("rnn", "--dtype bf16"),
            bench("lstm_cell", "--dtype bf16"),
            bench("gru_cell", "--dtype bf16"),
            bench("rnn_cell", "--dtype bf16"),
        ),
    ),
    Stage(
        "bench-exchange",
        "the LSTM by flags, beside bench-recurrent, where 16 bits are exchanged by values",
        (
            "env SEQKERN_LSTM_EXCHANGE=flags "
            + bench("lstm", "--dtype bf16 --peers seqkern").replace("/results", "/results-flags"),
        ),
        share=0.3,
    ),
    Stage(
        "bench-stacks",
        "several layers, two directions, tokens: where cuDNN may take its standard path",
        (
            bench("lstm_layers", "--dtype fp16"),
            bench("lstm_layers", "--dtype bf16"),
            bench("lstm_tokens", "--dtype bf16"),
        ),
    ),
    Stage(
        "bench-decode",
        "a step of attention, the sampler, whole models",
        (
            bench("attention_step", "--dtype bf16"),
            bench("linear_step", "--dtype bf16"),
            bench("sample", "--dtype fp32"),
        ),
    ),
)


def run(command: str, log: Path, seconds: float) -> tuple[int, float]:
    """Run a command with its output in `log`; exit code (124: out of time) and seconds."""
    begin = time.monotonic()
    with log.open("ab") as out:
        out.write(f"$ {command}\n".encode())
        out.flush()
        try:
            process = subprocess.Popen(
                shlex.split(command),
                cwd=ROOT,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=hear_interrupts,
            )
            code = finish(process, max(seconds, 1))
        except OSError as error:  # no such program
            out.write(f"{error}\n".encode())
            code = 127
        out.write(f"exit {code}\n\n".encode())
    return code, time.monotonic() - begin


def hear_interrupts() -> None:
    """Undo what a shell does to the commands it runs in the background, and they to theirs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit code, or 124 out of time.

    An interrupt lets pytest tell what failed so far. What does not end then, such as a process that
    waits for a kernel that hangs, is killed, with the compilers or tests that it has started.
    """
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(INTERRUPT_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return 124


def run_stage(
    stage: Stage, out: Path, seconds: float, case: float = 1.0
) -> list[tuple[str, str, int, float]]:
    """Stage, command, exit code and seconds of each of its commands, in so much time at most."""
    deadline = time.monotonic() + seconds
    rows = []
    for template in stage.commands:
        command = template.replace("{out}", shlex.quote(str(out))).replace("{case}", f"{case:g}")
        if "{architecture}" in command:
            command = command.replace("{architecture}", architecture())
        left = deadline - time.monotonic()
        code, seconds = run(command, out / f"{stage.name}.log", left) if left > 0 else (124, 0.0)
        rows.append((stage.name, command, code, seconds))
        print(f"{stage.name:16} exit {code:3} {seconds:7.1f} s  {command[:110]}", flush=True)
    for line in troubles(out / f"{stage.name}.log"):
        print(f"    {line}", flush=True)
    return rows


def architecture() -> str:
    """What CMake is to compile for: this GPU, with what its kind alone has (sm_90a)."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "native"
    major, _, minor = told.split()[0].partition(".") if told.strip() else ("", "", "")
    if not (major.isdecimal() and minor.isdecimal()):
        return "native"
    return f"{major}{minor}{'a' if int(major) >= 9 else ''}-real"


def troubles(log: Path, most: int = 30) -> list[str]:
    """Lines of a log that tell of something wrong, the first of them: for who sees only the end of
    what is printed."""
    if not log.exists():
        return []
    marks = (
        "FAILED",
        "ERROR",
        "!!!",
        "ninja: build stopped",
        "=========     at",
        "========= Invalid",
    )
    lines = [line for line in log.read_text(errors="replace").splitlines() if line[:2] != "$ "]
    found = [
        line[:160]
        for line in lines
        if line.lstrip().startswith(marks) or " FAILED " in line[:40] or ": error:" in line
    ]
    return found[:most] + ([f"... {len(found) - most} more"] if len(found) > most else [])


def run_stages(
    stages: Sequence[Stage], out: Path, minutes: float | None
) -> list[tuple[str, str, int, float]]:
    """The rows of all stages; `minutes` is shared among them as they come."""
    if minutes is None:
        return [row for stage in stages for row in run_stage(stage, out, stage.seconds)]
    deadline = time.monotonic() + 60 * minutes
    rows = []
    for i, stage in enumerate(stages):
        share = stage.share / sum(later.share for later in stages[i:])
        left = max(deadline - time.monotonic(), 0.0)
        rows += run_stage(stage, out, min(stage.seconds, share * left), case=0.3)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [stage.name for stage in STAGES]
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(names)}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where everything is written")
    parser.add_argument("--minutes", type=float, metavar="M", help="for all stages together")
    parser.add_argument("--list", action="store_true", help="print the commands, and stop")
    options = parser.parse_args(arguments)
    for name in options.stages:
        if name not in (*names, "bench"):
            parser.error(f"argument STAGE: must be one of {', '.join(names)}, got {name!r}")
    chosen = [
        stage
        for stage in STAGES
        if not options.stages
        or stage.name in options.stages
        or ("bench" in options.stages and stage.name.startswith("bench-"))
    ]
    if options.minutes is not None and not 0 < options.minutes < float("inf"):
        parser.error(f"argument --minutes: must be above 0, got {options.minutes:g}")
    if options.list:
        for stage in chosen:
            print(f"{stage.name}: {stage.why} (at most {stage.seconds:.0f} s)")
            print("".join(f"  {command}\n" for command in stage.commands), end="")
        return 0
    if options.out is None:
        parser.error("argument --out: a folder is needed")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
    rows = run_stages(chosen, out, options.minutes)
    summary = out / "summary.csv"
    new = not summary.exists()
    with summary.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(("stage", "command", "exit", "seconds"))
        writer.writerows((stage, command, code, f"{s:.1f}") for stage, command, code, s in rows)
    if (out / "results").is_dir():
        with tarfile.open(out / "results.tar.gz", "w:gz") as archive:  # one file to carry home
            archive.add(out / "results", "results")
    return 1 if any(code for _, _, code, _ in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
