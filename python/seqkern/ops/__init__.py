"""The ops: pure functions on tensors, each backed by a hand-written kernel on every device."""

from seqkern.ops.cross_entropy import cross_entropy
from seqkern.ops.lstm import lstm
from seqkern.ops.lstm_cell import lstm_cell

__all__ = ["cross_entropy", "lstm", "lstm_cell"]
