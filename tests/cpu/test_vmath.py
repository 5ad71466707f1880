"""Accuracy of the vector functions, per instruction set (programs built by `make emulator`)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "build" / "emulator"

#: Worst allowed: units in the last place for functions, counts for the rest.
BOUNDS = {
    "exp_float": 2.0,
    "exp_double": 2.0,
    "expm1_float": 2.5,
    "expm1_double": 2.5,
    "exp_zero_below": 0.0,
    "exp_nan_stays": 0.0,
    "tanh_float": 3.0,
    "tanh_float_small": 2.0,
    "tanh_derivative_float": 6.0,
    "tanh_double": 2.0,
    "sigmoid_float": 3.0,
    "sigmoid_double": 3.0,
    "vtanh_double": 3.0,
    "vtanh_float": 3.0,
    "vtanh_float_small": 2.0,
    "vtanh_ends_wrong": 0.0,
    "sigmoid_ends_wrong": 0.0,
    "half_load_mismatches": 0.0,
    "half_store_mismatches": 0.0,
    "bf16_store_mismatches": 0.0,
}


def _runs_here(isa: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text()
    needs = {"avx2": " avx2 ", "wide": " avx2 ", "avx512": " avx512bw "}
    return needs.get(isa, "") in flags


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "wide"])
def test_vector_functions(isa: str) -> None:
    if not _runs_here(isa):
        pytest.skip(f"this processor has no {isa}")
    programs = list(BUILD.rglob(f"vmath_{isa}"))
    assert programs, f"vmath_{isa} is not built; run `make emulator`"
    output = subprocess.run([programs[0]], capture_output=True, text=True, check=True).stdout
    worst = {name: float(value) for name, value in (line.split() for line in output.splitlines())}
    assert worst.keys() == BOUNDS.keys()
    assert {name: value for name, value in worst.items() if value > BOUNDS[name]} == {}
