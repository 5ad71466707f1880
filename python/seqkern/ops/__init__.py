"""The ops: pure functions on tensors, each backed by a hand-written kernel on every device."""

from seqkern.ops.attention import causal_attention
from seqkern.ops.attention_step import attention_step
from seqkern.ops.cross_entropy import cross_entropy
from seqkern.ops.decoder_step import decoder_step
from seqkern.ops.gru import gru
from seqkern.ops.gru_cell import gru_cell
from seqkern.ops.linear_cross_entropy import linear_cross_entropy
from seqkern.ops.linear_step import linear_step
from seqkern.ops.lstm import lstm
from seqkern.ops.lstm_cell import lstm_cell
from seqkern.ops.rnn import rnn
from seqkern.ops.rnn_cell import rnn_cell
from seqkern.ops.sample import sample
from seqkern.ops.softmax import log_softmax, softmax
from seqkern.ops.vocab_parallel import vocab_parallel_linear_cross_entropy

__all__ = [
    "attention_step",
    "causal_attention",
    "cross_entropy",
    "decoder_step",
    "gru",
    "gru_cell",
    "linear_cross_entropy",
    "linear_step",
    "log_softmax",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
    "sample",
    "softmax",
    "vocab_parallel_linear_cross_entropy",
]
