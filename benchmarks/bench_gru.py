"""A one-layer GRU over x [T, B, H], input product included."""

from __future__ import annotations

from benchmarks.recurrent import benchmark

BENCHMARK = benchmark("gru", 3)
