"""One step of an LSTM with input width H over x [B, H], products included."""

from __future__ import annotations

from benchmarks.cells import benchmark

BENCHMARK = benchmark("lstm_cell", 4, 2)
