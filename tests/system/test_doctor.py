"""The lines of the report that no machine of ours without a GPU prints by itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from seqkern import doctor, nn, ops


@pytest.mark.parametrize(
    ("kernel", "line"),
    [
        (
            {
                "name": "k",
                "architecture": 90,
                "registers": 40,
                "shared_bytes": 128,
                "local_bytes": 0,
                "max_threads": 1024,
            },
            "sm_90, 40 registers, 128 B shared, 0 B local, up to 1024 threads",
        ),
        ({"name": "k", "error": "no CUDA-capable device"}, "no CUDA-capable device"),
    ],
)
def test_line_of_a_cuda_kernel(kernel: dict[str, str | int], line: str) -> None:
    assert doctor._resource_line(kernel) == line


@pytest.mark.parametrize(
    ("architecture", "gpus"),
    [
        ("80-real", [(8, 0), (8, 6), (8, 9)]),
        ("86-real", [(8, 6), (8, 9)]),
        ("90a-real", [(9, 0)]),
        ("120-virtual", [(12, 0), (12, 1)]),
        ("86", [(8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)]),
    ],
)
def test_which_gpus_a_build_serves(architecture: str, gpus: list[tuple[int, int]]) -> None:
    known = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)]
    assert [gpu for gpu in known if doctor._serves(architecture, *gpu)] == gpus


def test_every_public_op_and_layer_is_in_the_report() -> None:
    text = doctor.report()
    named = {name for o in doctor.OPERATIONS for name in o.name.replace(",", " ").split()}
    assert {f"ops.{name}" for name in ops.__all__} <= named
    assert {f"nn.{name}" for name in nn.__all__} <= named
    assert "lacks this kernel" not in text
    assert text.count("    cpu   seqkern's") == len(doctor.OPERATIONS)


def test_an_unknown_instruction_set_is_named_on_import() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import seqkern"],
        env={**os.environ, "SEQKERN_FORCE_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "ImportError: SEQKERN_FORCE_ISA must be baseline, avx2, avx512, avx512_bf16 or amx, got "
        "'AVX2'"
    )
