"""Benchmarks of seqkern's ops beside the peers that are installed: `python -m benchmarks`.

Not part of the installed package; run from the root of a checkout (docs/benchmarks.md).
"""
