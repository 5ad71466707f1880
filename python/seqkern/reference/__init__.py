"""Plain PyTorch forms of the ops: the definition that kernels are tested against.

They run in whatever precision they are given, so float64 inputs make the reference of a test, and
they are differentiable any number of times, which is how the ops' second derivatives are defined.
"""

from seqkern.reference.attention import causal_attention
from seqkern.reference.cross_entropy import cross_entropy

__all__ = ["causal_attention", "cross_entropy"]
