"""forecast.png: the series, the held-back forecasts, what comes next, and the errors."""

from pathlib import Path
from typing import Any

import numpy as np

from seqkern.errors import missing_extra
from seqkern.forecasting.run import ForecastResult

_SERIES, _MODEL, _HELD_BACK, _MARK = "#555555", "#c8442d", "#1f5c99", "#999999"
_BASELINES = ("#9bb8d3", "#7a9a4e", "#c9a227", "#8e6bb0")
_MOST_PANELS = 3


def draw_forecast(result: ForecastResult, path: Path) -> None:
    """Draw the first series: a panel per column (the first three), and the errors below.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_extra("matplotlib", "plot", "forecast.png") from error
    columns = result.series[0].columns[:_MOST_PANELS]
    panels = len(columns) + 1
    figure = Figure(figsize=(10, 1.2 + 2.9 * panels), dpi=120, layout="constrained")
    grid = figure.subplots(panels, 1, squeeze=False, height_ratios=[1.3] * len(columns) + [1.0])
    for d, axes in enumerate(grid[:-1, 0]):
        _draw_series(axes, result, d)
    grid[0, 0].set_title(_title(result), fontsize=11)
    _draw_errors(grid[-1, 0], result)
    figure.savefig(path)


def _title(result: ForecastResult) -> str:
    o, series = result.options, result.series[0]
    named = f", series {series.name}" if series.name else ""
    more = f" (the first of {len(result.series)})" if len(result.series) > 1 else ""
    return (
        f"{Path(o.file).name}{named}{more}: {o.horizon} steps of {series.interval.text} ahead by "
        f"{result.method.name}"
    )


def _draw_series(axes: Any, result: ForecastResult, d: int) -> None:
    """The end of the series, forecasts of held-back windows, and the forecast of the future."""
    o, series, cut = result.options, result.series[0], result.cuts[0]
    T, H = len(series), o.horizon
    first = max(0, T - max(8 * H, 3 * result.season, 60))
    x, y = series.stamps, series.values[:, d].numpy()
    axes.plot(x[first:], y[first:], color=_SERIES, linewidth=1.0, label=series.columns[d])
    ends = [(0, t) for t in range(T - H, max(cut, first + 1) - 1, -H)]
    values = [one.values for one in result.series]
    label: str | None = "forecasts of held-back windows"
    for (_, t), window in zip(
        ends, result.method.forecast(values, ends, o.level).center if ends else (), strict=True
    ):
        known = np.concatenate([y[t - 1 : t], window[:, d].numpy()])
        axes.plot(x[t - 1 : t + H], known, color=_HELD_BACK, linewidth=1.1, label=label)
        label = None
    future = series.interval.after(x[-1], H)
    f = result.forecast
    lower, upper, center = (bound[0, :, d].numpy() for bound in (f.lower, f.upper, f.center))
    style = {"marker": "o", "markersize": 4} if H == 1 else {}
    axes.plot(future, center, color=_MODEL, linewidth=1.8, label="forecast", **style)
    band = f"{100 * f.level:g}% interval"
    if H > 1:
        axes.fill_between(future, lower, upper, color=_MODEL, alpha=0.2, linewidth=0, label=band)
    else:
        axes.vlines(future, lower, upper, color=_MODEL, alpha=0.4, linewidth=4, label=band)
    if cut > first:
        axes.axvline(x[cut], color=_MARK, linestyle="--", linewidth=1, label="held back from here")
    axes.set_ylabel(series.columns[d])
    axes.set_xlabel(o.time or "step")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="best")


def _draw_errors(axes: Any, result: ForecastResult) -> None:
    """Mean absolute error of the first column by step ahead, of every method."""
    o, series = result.options, result.series[0]
    column = series.columns[0]
    scores = [score for score in result.scores if score.column == column]
    steps = np.arange(1, o.horizon + 1)
    for score, color in zip(scores, (_MODEL, *_BASELINES), strict=False):
        own = score.method == result.method.name
        axes.plot(
            steps,
            score.mae_by_step,
            color=color,
            linewidth=2.0 if own else 1.3,
            marker="o" if o.horizon <= 30 else None,
            markersize=4 if own else 3,
            label=f"{score.method} (mean {score.mae:.4g})",
        )
    axes.set_xlabel(f"steps ahead [1 step = {series.interval.text}]")
    axes.set_ylabel(f"mean absolute error\n[units of {column}]")
    axes.set_ylim(bottom=0)
    axes.set_title(f"errors in {scores[0].windows} held-back windows", fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
