"""Modules: torch.nn's constructors and state_dicts over seqkern's ops."""

from seqkern.nn.attention import CausalSelfAttention
from seqkern.nn.cross_entropy import CrossEntropyLoss
from seqkern.nn.gru import GRU, GRUCell
from seqkern.nn.kv_cache import KVCache
from seqkern.nn.linear_cross_entropy import LinearCrossEntropyLoss
from seqkern.nn.lstm import LSTM, LSTMCell
from seqkern.nn.rnn import RNN, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "CausalSelfAttention",
    "CrossEntropyLoss",
    "GRUCell",
    "KVCache",
    "LSTMCell",
    "LinearCrossEntropyLoss",
    "RNNCell",
]
