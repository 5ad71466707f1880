"""Modules: torch.nn's constructors and state_dicts over seqkern's ops."""

from seqkern.nn.attention import CausalSelfAttention
from seqkern.nn.cross_entropy import CrossEntropyLoss
from seqkern.nn.kv_cache import KVCache
from seqkern.nn.linear_cross_entropy import LinearCrossEntropyLoss

__all__ = [
    "CausalSelfAttention",
    "CrossEntropyLoss",
    "KVCache",
    "LinearCrossEntropyLoss",
]
