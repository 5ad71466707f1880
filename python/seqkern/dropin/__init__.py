"""Existing models and scripts on seqkern's kernels, without edits."""

from seqkern.dropin.accelerating import accelerate
from seqkern.dropin.patching import PatchRecord, patch, unpatch

__all__ = ["PatchRecord", "accelerate", "patch", "unpatch"]
