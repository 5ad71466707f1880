"""One step of an RNN with input width H over x [B, H], products included."""

from __future__ import annotations

from benchmarks.cells import benchmark

BENCHMARK = benchmark("rnn_cell", 1)
