"""Fast, exact, hand-written kernels for training and sampling sequence models with PyTorch."""

from importlib.metadata import version

from seqkern._interrupt import quietly as _quietly

with _quietly():
    from seqkern import _load as _load
    from seqkern import data, models, nn, ops
    from seqkern.dropin import accelerate, patch, unpatch

__version__ = version("seqkern")
__all__ = ["__version__", "accelerate", "data", "models", "nn", "ops", "patch", "unpatch"]
