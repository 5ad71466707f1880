"""The accuracy rule at the sizes of real layers, where sums are long: how a product adds up a
thousand terms decides there, and does not show in the small shapes of the other tests."""

from __future__ import annotations

import hidden_cases
import pytest
import test_cells as cells
import test_lstm as lstm_cases
import torch

from recurrent import compare

#: T, B, input width, H: few rows, and more than one block of them.
SHAPES = [(3, 4, 1200, 600), (5, 45, 16, 1200), (3, 130, 40, 512)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lstm(shape: tuple[int, int, int, int]) -> None:
    functions = (f() for f in (lstm_cases.ours, lstm_cases.theirs, lstm_cases.exact))
    compare(*functions, lambda: lstm_cases.make(shape, torch.float32, "cpu"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", ["gru", "tanh"])
def test_gru_and_rnn(cell: str, shape: tuple[int, int, int, int]) -> None:
    functions = (f(cell) for f in (hidden_cases.ours, hidden_cases.theirs, hidden_cases.exact))
    compare(*functions, lambda: hidden_cases.make(cell, shape, torch.float32, "cpu"))


@pytest.mark.parametrize("cell", cells.CELLS)
@pytest.mark.parametrize("B", [1, 4, 20, 45])
@pytest.mark.parametrize(("I", "H"), [(1200, 1200), (1010, 501)])
def test_cells(cell: str, B: int, I: int, H: int) -> None:  # noqa: E741
    case = cells.CELLS[cell]
    compare(case.ours, case.theirs, case.exact, lambda: case.make((B, I, H), torch.float32, "cpu"))
