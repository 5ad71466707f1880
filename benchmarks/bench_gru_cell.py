"""One step of a GRU with input width H over x [B, H], products included."""

from __future__ import annotations

from benchmarks.cells import benchmark

BENCHMARK = benchmark("gru_cell", 3)
