"""How well methods forecast windows that they were not fitted on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqkern.errors import require
from seqkern.forecasting.methods import Ends, Method
from seqkern.models import Forecast


@dataclass(frozen=True)
class Score:
    """Errors of a method in one column, in its units, over all steps of all windows."""

    method: str
    column: str
    windows: int
    mae: float  # mean absolute error
    rmse: float  # root mean square error
    coverage: float  # share of the values inside their interval
    width: float  # mean width of the intervals
    mae_by_step: tuple[float, ...]  # [horizon]


def backtest_ends(
    cuts: Sequence[int], lengths: Sequence[int], horizon: int, most: int = 400
) -> list[tuple[int, int]]:
    """Where windows end whose future is held back and known.

    Args:
        cuts: per series the steps before what is held back.
        lengths: steps of each series.
        horizon: steps that must follow an end.
        most: windows in all, about; with more possible ones they are spread evenly.

    Raises:
        UserError: no series has a window.

    Example:
        >>> backtest_ends([6, 3], [10, 4], horizon=2)
        [(0, 6), (0, 7), (0, 8)]
    """
    held = max((n - cut for cut, n in zip(cuts, lengths, strict=True)), default=0)
    require(
        held >= horizon,
        f"horizon is {horizon}, but at most {held} steps of a series are held back: use a shorter "
        "horizon, hold back more, or give longer series",
    )
    spans = [range(cut, n - horizon + 1) for cut, n in zip(cuts, lengths, strict=True)]
    stride = math.ceil(sum(len(span) for span in spans) / most)
    return [(s, t) for s, span in enumerate(spans) for t in span[::stride]]


def backtest(
    methods: Sequence[Method],
    values: Sequence[Tensor],
    ends: Ends,
    horizon: int,
    level: float,
    columns: Sequence[str],
) -> list[Score]:
    """The scores of each method in each column.

    A method sees everything before a window's end, and was fitted before what is held back.

    Args:
        methods: fitted.
        values: [T_s, D] of each series.
        ends: the windows, see `backtest_ends`.
        horizon: steps that follow each.
        level: of the intervals.
        columns: names of the D columns.
    """
    actual = torch.stack([values[s][t : t + horizon] for s, t in ends])  # [N, horizon, D]
    return [
        score
        for method in methods
        for score in _scores(method.name, method.forecast(values, ends, level), actual, columns)
    ]


def _scores(name: str, forecast: Forecast, actual: Tensor, columns: Sequence[str]) -> list[Score]:
    error = actual - forecast.center
    inside = (actual >= forecast.lower) & (actual <= forecast.upper)
    width = forecast.upper - forecast.lower
    return [
        Score(
            method=name,
            column=column,
            windows=len(actual),
            mae=float(error[..., d].abs().mean()),
            rmse=float(error[..., d].square().mean().sqrt()),
            coverage=float(inside[..., d].double().mean()),
            width=float(width[..., d].mean()),
            mae_by_step=tuple(error[..., d].abs().mean(0).tolist()),
        )
        for d, column in enumerate(columns)
    ]
