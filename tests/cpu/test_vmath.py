"""Accuracy of the vector functions, per instruction set (programs built by `make emulator`)."""

from __future__ import annotations

import pytest
from cpu_programs import ISAS, run_program

#: Worst allowed: units in the last place for functions, counts for the rest.
BOUNDS = {
    "exp_float": 2.0,
    "exp_double": 2.0,
    "expm1_float": 2.5,
    "expm1_double": 2.5,
    "exp_zero_below": 0.0,
    "exp_nan_stays": 0.0,
    "log_float": 1.0,
    "log_float_near_1": 1.0,
    "log_double": 1.0,
    "log_double_near_1": 1.0,
    "log_ends_wrong": 0.0,
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
    "parts_wrong": 0.0,
}


@pytest.mark.parametrize("isa", ISAS)
def test_vector_functions(isa: str) -> None:
    worst = run_program("vmath", isa)
    assert worst.keys() == BOUNDS.keys()
    assert {name: value for name, value in worst.items() if value > BOUNDS[name]} == {}
