"""cmake/architectures.cmake: which GPUs the CUDA kernels are compiled for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MODULE = Path(__file__).parents[2] / "cmake" / "architectures.cmake"
KNOWN = (75, 80, 86, 89, 90, 100, 103, 120)
NO_GPU = "exit 9"
ALL = "80-real;86-real;89-real;90a-real;100-real;120-real;120-virtual"


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run(tmp_path: Path, listed: str | None, smi: str) -> subprocess.CompletedProcess[str]:
    """The module with an nvcc that knows KNOWN, and an nvidia-smi that does as `smi` says."""
    cmake = shutil.which("cmake")
    assert cmake, "the build needs it, too"
    nvcc = tmp_path / "nvcc"
    program(nvcc, "\n".join(f"echo sm_{number}" for number in KNOWN))
    program(tmp_path / "nvidia-smi", smi)
    script = tmp_path / "script.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.24)\n"
        f"include({MODULE})\n"
        f"seqkern_cuda_architectures({nvcc} chosen)\n"
        'message("${chosen}")\n'
    )
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    if listed is not None:
        environment["TORCH_CUDA_ARCH_LIST"] = listed
    return subprocess.run(
        [cmake, "-P", str(script)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("listed", "smi", "chosen"),
    [
        (None, NO_GPU, ALL),
        ("", NO_GPU, ALL),
        ("8.0;9.0a+PTX", NO_GPU, "80-real;90a"),
        ("8.6 10.0+PTX 8.6", "echo 9.0", "86-real;100"),
        (None, "echo 9.0; echo 9.0", "90a-real"),
        (None, "echo 12.0; echo 8.6", "86-real;120-real"),
        (None, "echo 7.5", ALL),  # the kernels begin at 8.0
        (None, "echo 8.0; echo 13.0", ALL),  # one that is newer than nvcc
        (None, "echo driver does not answer; exit 9", ALL),
    ],
)
def test_architectures(tmp_path: Path, listed: str | None, smi: str, chosen: str) -> None:
    result = run(tmp_path, listed, smi)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == chosen


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("Hopper", "must be of entries like 8.0 or 9.0a+PTX, got 'Hopper'"),
        ("7.0 8.0", "has 7.0, which this nvcc does not compile for; it knows 75 80 86 89 90 100"),
    ],
)
def test_a_wrong_list_is_named(tmp_path: Path, listed: str, message: str) -> None:
    result = run(tmp_path, listed, NO_GPU)
    assert result.returncode != 0
    assert f"TORCH_CUDA_ARCH_LIST {message}" in " ".join(result.stderr.split())
