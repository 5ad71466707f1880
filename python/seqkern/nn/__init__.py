"""Modules: torch.nn's constructors and state_dicts over seqkern's ops."""

from seqkern.nn.attention import CausalSelfAttention
from seqkern.nn.cross_entropy import CrossEntropyLoss

__all__ = ["CausalSelfAttention", "CrossEntropyLoss"]
