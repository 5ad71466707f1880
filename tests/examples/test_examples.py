"""Every script of examples/ runs to its end on small settings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_example_runs_on_small_settings(script, tmp_path):
    done = subprocess.run(
        [sys.executable, script, "--small"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_examples():
    assert len(SCRIPTS) >= 5


def test_processes_that_share_a_token_file_end_with_one_model(tmp_path):
    """Two processes under torchrun: the same position and the same parameters on both."""
    script = SCRIPTS[0].parent / "distributed.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, script, "--small"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        # Unbuffered, where lines that two processes print can run into one another.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONUNBUFFERED": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    ends = [line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith("rank ")]
    assert sorted(rank for rank, _ in ends) == ["rank 0", "rank 1"]
    assert ends[0][1] == ends[1][1]
    assert "'position': 3" in ends[0][1]
