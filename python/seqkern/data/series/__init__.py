"""Time series: tables, intervals, gaps, splits by time, normalisation, windows."""

from seqkern.data.series.interval import Interval, find_interval
from seqkern.data.series.table import Series, make_series, read_series
from seqkern.data.series.windows import (
    Normalizer,
    WindowBatch,
    WindowSampler,
    gather_windows,
    split_by_time,
    time_cuts,
)

__all__ = [
    "Interval",
    "Normalizer",
    "Series",
    "WindowBatch",
    "WindowSampler",
    "find_interval",
    "gather_windows",
    "make_series",
    "read_series",
    "split_by_time",
    "time_cuts",
]
