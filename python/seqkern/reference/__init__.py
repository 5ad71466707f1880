"""Plain PyTorch forms of the ops: the definition that kernels are tested against.

They run in whatever precision they are given, so float64 inputs make the reference of a test, and
they are differentiable any number of times, which is how the ops' second derivatives are defined.
"""

from seqkern.reference.attention import causal_attention
from seqkern.reference.attention_step import attention_step
from seqkern.reference.cross_entropy import cross_entropy
from seqkern.reference.gru import gru, gru_cell
from seqkern.reference.linear_cross_entropy import linear_cross_entropy
from seqkern.reference.linear_step import linear_step
from seqkern.reference.lstm import lstm, lstm_cell
from seqkern.reference.rnn import rnn, rnn_cell
from seqkern.reference.sample import token_distribution
from seqkern.reference.softmax import softmax, softmax_backward

__all__ = [
    "attention_step",
    "causal_attention",
    "cross_entropy",
    "gru",
    "gru_cell",
    "linear_cross_entropy",
    "linear_step",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
    "softmax",
    "softmax_backward",
    "token_distribution",
]
