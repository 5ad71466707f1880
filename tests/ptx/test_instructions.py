"""What instructions of one thread mean to the emulator (integers.h, floats.h). Expected values
follow from the PTX ISA, by Python and numpy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from harness import HEAD, Array, build, launch
from instructions import (
    COMPARISONS,
    FLOAT_CASES,
    INTEGER_CASES,
    NUMPY,
    all_kernels,
    bits,
    case_name,
    values,
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(HEAD + all_kernels(), tmp_path_factory.mktemp("instructions"))


def run_case(
    library: ctypes.CDLL, instruction: str, kinds: list[str], result: str, inputs: list[Array]
) -> Array:
    out = np.zeros(len(inputs[0]), NUMPY[result])
    padded = [*inputs, *[inputs[0]] * (3 - len(inputs))]
    assert launch(library, case_name(instruction), *padded, out, threads=len(out)) is None
    return out


def combinations(kinds: list[str]) -> list[Array]:
    """Every value with every other, and a third shuffled among them."""
    first = values(kinds[0])
    if len(kinds) == 1:
        return [first]
    second = values(kinds[1])
    a, b = np.repeat(first, len(second)), np.tile(second, len(first))
    rest = [np.resize(np.roll(values(kind), 7), len(a)) for kind in kinds[2:]]
    return [a, b, *rest]


@pytest.mark.parametrize(
    ("instruction", "operands", "result", "meaning"),
    INTEGER_CASES,
    ids=[c[0] for c in INTEGER_CASES],
)
def test_integers(
    kernels: ctypes.CDLL, instruction: str, operands: str, result: str, meaning: Callable[..., int]
) -> None:
    kinds = operands.split()
    inputs = combinations(kinds)
    if instruction.startswith(("div", "rem")):  # by 0: unspecified
        keep = inputs[1] != 0
        inputs = [x[keep] for x in inputs]
    found = run_case(kernels, instruction, kinds, result, inputs)
    expected = [bits(meaning(*(int(x) for x in row)), result) for row in zip(*inputs, strict=True)]
    assert found.tolist() == expected


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("instruction", "operands", "result", "meaning"), FLOAT_CASES, ids=[c[0] for c in FLOAT_CASES]
)
def test_floats(
    kernels: ctypes.CDLL, instruction: str, operands: str, result: str, meaning: Callable[..., Any]
) -> None:
    kinds = operands.split()
    inputs = combinations(kinds)
    found = run_case(kernels, instruction, kinds, result, inputs)
    with np.errstate(all="ignore"):
        results = [meaning(*row) for row in zip(*inputs, strict=True)]
        # Of numpy's integers, some lists make floats.
        expected = np.array(results, object if result[0] in "su" else None).astype(NUMPY[result])
    if result[0] == "f":
        assert np.array_equal(
            np.signbit(found) & ~np.isnan(found), np.signbit(expected) & ~np.isnan(expected)
        )
        assert np.array_equal(found, expected, equal_nan=True)
    elif "f16" in instruction:  # of a NaN the ISA leaves the bits open
        nan = np.isnan(inputs[0]) | np.isnan(inputs[-1])
        assert found[~nan].tolist() == expected[~nan].tolist()
    else:
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("comparison", "kind", "meaning"), COMPARISONS, ids=[f"{c[0]}-{c[1]}" for c in COMPARISONS]
)
def test_comparisons(
    kernels: ctypes.CDLL, comparison: str, kind: str, meaning: Callable[..., bool]
) -> None:
    inputs = combinations([kind, kind])
    found = run_case(kernels, f"setp.{comparison}.{kind}", [kind, kind], "u32", inputs)
    assert found.tolist() == [int(meaning(a, b)) for a, b in zip(*inputs, strict=True)]


def test_approximations_stay_within_their_bounds(kernels: ctypes.CDLL) -> None:
    x = np.concatenate([np.linspace(-100, 100, 900), np.arange(-60, 40)]).astype(np.float32)
    found = run_case(kernels, "ex2.approx.ftz.f32", ["f32"], "f32", [x])
    exact = np.exp2(x.astype(np.float64))
    error = np.abs(found / exact - 1)
    assert error.max() <= 2 * 2.0**-23
    assert error.max() > 2.0**-23  # approximates
    whole = x == np.floor(x)
    assert np.array_equal(found[whole], exact[whole])

    found = run_case(kernels, "lg2.approx.f32", ["f32"], "f32", [np.exp2(x / 10)])
    exact = np.log2(np.exp2(x / 10).astype(np.float64))
    assert np.abs((found - exact) / np.maximum(1, np.abs(exact))).max() <= 2.0**-22 + 2.0**-24

    found = run_case(kernels, "rcp.approx.ftz.f32", ["f32"], "f32", [np.exp2(x)])
    assert np.abs(found * np.exp2(x).astype(np.float64) - 1).max() <= 2.0**-23
    ends = np.array([0.0, -0.0, np.inf, -np.inf, 1e-40, 2.0**127], np.float32)
    found = run_case(kernels, "rcp.approx.ftz.f32", ["f32"], "f32", [ends])
    assert found.tolist() == [np.inf, -np.inf, 0, 0, np.inf, 0]  # subnormal numbers are 0

    y = np.roll(np.abs(x) + 0.5, 3)
    found = run_case(kernels, "div.approx.f32", ["f32", "f32"], "f32", [x, y])
    assert np.abs(found - x.astype(np.float64) / y).max() <= (2 * 2.0**-23 * np.abs(x / y)).max()
