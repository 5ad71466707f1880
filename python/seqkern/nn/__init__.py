"""Modules: torch.nn's constructors and state_dicts over seqkern's ops."""

from seqkern.nn.cross_entropy import CrossEntropyLoss
from seqkern.nn.lstm import LSTM, LSTMCell

__all__ = ["LSTM", "CrossEntropyLoss", "LSTMCell"]
