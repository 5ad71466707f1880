"""The ops: pure functions on tensors, each backed by a hand-written kernel on every device."""

from seqkern.ops.attention_step import attention_step
from seqkern.ops.cross_entropy import cross_entropy
from seqkern.ops.sample import sample

__all__ = ["attention_step", "cross_entropy", "sample"]
