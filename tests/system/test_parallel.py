"""Training by several processes equals training by one."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from system_options import TINY

import seqkern
from seqkern.checkpoint import load_checkpoint
from seqkern.metrics import read_metrics
from seqkern.parallel import Parallel

OPTIONS = [*TINY, "--dropout", "0", "--model", "gpt", "--save-every", "6"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def together(text_file):
    """Runs `seqkern train` in several processes: exit codes and what each one printed."""

    def run(world, out, *options):
        argv = [sys.executable, "-m", "seqkern", "train"]
        if "--resume" not in options:
            argv += ["--data", text_file, *OPTIONS]
        else:
            argv += ["--quiet", "--no-plot", "--threads", "1"]
        argv += ["--out", out, *options]
        port = str(free_port())
        path = str(Path(seqkern.__file__).parent.parent)
        processes = []
        for rank in range(world):
            environment = {
                **os.environ,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                **{"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            }
            processes.append(
                subprocess.Popen(
                    [str(part) for part in argv],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        printed = [process.communicate(timeout=120) for process in processes]
        # torch 2.10 tells of its connections on standard output.
        ours = [(re.sub(r"(?m)^\[Gloo\].*\n", "", out), err) for out, err in printed]
        return [process.returncode for process in processes], ours

    return run


def numbers(run):
    return [
        (row.step, row.train_loss or 0.0, row.val_loss or 0.0, row.gradient_norm or 0.0)
        for row in read_metrics(run / "metrics.csv")
    ]


def assert_same_training(run, other):
    assert len(numbers(run)) == len(numbers(other)) == 13
    for ours, theirs in zip(numbers(run), numbers(other), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)
    mine, others = load_checkpoint(run), load_checkpoint(other)
    assert mine.step == others.step == 12
    for part in ("model", "optimizer"):
        torch.testing.assert_close(getattr(mine, part), getattr(others, part), atol=2e-4, rtol=1e-3)
    assert torch.equal(mine.state["sampler"], others.state["sampler"])


@pytest.fixture(scope="session")
def alone(tmp_path_factory, text_file):
    """The run that the others are compared with."""
    out = tmp_path_factory.mktemp("alone") / "run"
    argv = ["train", "--data", str(text_file), *OPTIONS, "--out", str(out)]
    assert seqkern.cli.main(argv) == 0
    return out


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_and_are_continued_by_one(
    together, cli_run, alone, tmp_path, kind
):
    out = tmp_path / "run"
    codes, printed = together(2, out, "--parallel", kind, "--accumulate", "2", "--stop-after", "7")
    assert codes == [0, 0], printed
    assert printed[0][0].startswith(f"{out}: gpt, ")
    assert printed[1][0] == ""  # the first process speaks for all
    state = load_checkpoint(out).state
    assert {"sampler", "torch", "torch.1"} == state.keys()
    assert not torch.equal(state["torch"], state["torch.1"])
    code, *_ = cli_run("train", "--resume", "--out", out, "--quiet", "--no-plot")
    assert code == 0
    assert_same_training(out, alone)


def test_two_processes_continue_what_one_began(together, cli_run, alone, text_file, tmp_path):
    out = tmp_path / "run"
    argv = ["train", "--data", text_file, *OPTIONS, "--out", out, "--stop-after", 6]
    assert cli_run(*argv)[0] == 0
    codes, printed = together(2, out, "--resume", "--parallel", "fsdp")
    assert codes == [0, 0], printed
    assert_same_training(out, alone)


def test_accumulation_by_one_process(cli_run, alone, text_file, tmp_path):
    out = tmp_path / "run"
    argv = ["train", "--data", text_file, *OPTIONS, "--out", out, "--accumulate", 4]
    assert cli_run(*argv)[0] == 0
    assert_same_training(out, alone)


def test_a_mistake_is_every_process_s(together, alone, tmp_path):
    codes, printed = together(2, alone)
    assert codes == [2, 2]
    assert printed[0][1] == (
        f"seqkern: error: {alone} already holds a run: use --resume, or another --out\n"
    )
    assert printed[1][1].startswith("seqkern: process 1: error: ")
    codes, printed = together(2, tmp_path / "run", "--accumulate", "3")
    assert codes == [2, 2]
    assert "batch_size must be a multiple of processes x accumulate = 2 x 3, got 4" in printed[0][1]
    assert not (tmp_path / "run").exists()


def test_alone_nothing_is_joined_or_changed():
    parallel = Parallel()
    model = torch.nn.Linear(2, 2)
    assert parallel.wrap(model, "fsdp") is model
    assert not torch.distributed.is_initialized()
    assert parallel.largest(3, 4) == (3, 4)
    assert parallel.seed(5) == 5
    x = torch.arange(12).view(6, 2)
    parts = list(parallel.parts(x, x, 3))
    assert len(parts) == 3
    assert torch.equal(torch.cat([inputs for inputs, _ in parts]), x)
