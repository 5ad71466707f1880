"""What becomes of freed memory in the processes of our commands."""

import os

from seqkern import _C


def keep_freed_memory() -> bool:
    """Let the C library keep for the next step what this process frees.

    A training step frees large tensors and asks for the same again. glibc gives those above 32 MiB
    back to the system at once, which hands them out anew page by page, each cleared.

    Returns:
        Whether it does: not without glibc, nor where the environment says how malloc is to behave.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    return _C.keep_freed_memory()
