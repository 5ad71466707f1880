"""From series to forecasts: methods that share one interface, backtests, results on the disk."""

from seqkern.forecasting.backtest import Score, backtest, backtest_ends
from seqkern.forecasting.methods import (
    Linear,
    Method,
    Naive,
    Network,
    find_season,
    select_order,
)
from seqkern.forecasting.training import Fit, train_forecaster

__all__ = [
    "Fit",
    "Linear",
    "Method",
    "Naive",
    "Network",
    "Score",
    "backtest",
    "backtest_ends",
    "find_season",
    "select_order",
    "train_forecaster",
]
