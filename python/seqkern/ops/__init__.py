"""The ops: pure functions on tensors, each backed by a hand-written kernel on every device."""

from seqkern.ops.attention import causal_attention
from seqkern.ops.cross_entropy import cross_entropy

__all__ = ["causal_attention", "cross_entropy"]
