"""The programs that `make emulator` builds per instruction set."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from seqkern import _C

BUILD = Path(__file__).parents[2] / "build" / "emulator"

#: `wide` and `tiles` are AVX-512 and the matrix unit made with AVX2 (CMakeLists.txt).
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx", "wide", "tiles")


def run_program(name: str, isa: str) -> dict[str, float]:
    """What it prints, a name and a number per line; skips what this processor cannot run."""
    if {"wide": "avx2", "tiles": "avx2"}.get(isa, isa) not in _C.cpu_isas():
        pytest.skip(f"this processor has no {isa}")
    programs = list(BUILD.rglob(f"{name}_{isa}"))
    assert programs, f"{name}_{isa} is not built; run `make emulator`"
    output = subprocess.run([programs[0]], capture_output=True, text=True, check=True).stdout
    return {key: float(value) for key, value in (line.split() for line in output.splitlines())}
