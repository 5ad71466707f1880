"""A one-layer tanh RNN over x [T, B, H], input product included."""

from __future__ import annotations

from benchmarks.recurrent import benchmark

BENCHMARK = benchmark("rnn", 1)
