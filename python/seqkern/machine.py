"""What this machine has room for: sizes that cannot fit are refused before they are tried."""

import os

from seqkern.errors import require

#: Beyond it threads only take turns, and OpenMP may end the process (100,000 did).
THREADS_PER_CPU = 4

_MEMORY_ERRORS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "Storage size calculation overflowed",
    "numel: integer multiplication overflow",
)


def memory_bytes() -> int | None:
    """The machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def require_memory(needed: int, what: str, remedy: str) -> None:
    """Raise `UserError` where `needed` bytes are more than the machine has."""
    there = memory_bytes()
    require(
        there is None or needed <= there,
        f"{what} of memory, more than the {in_words(there or 0)} of this machine: {remedy}",
    )


def in_words(size: int) -> str:
    """Bytes with a unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if size < 1024:
            return f"{size} {unit}"
        size //= 1024
    return f"{size:,} EiB" if size < 10**6 else "far too many bytes"


def most_threads() -> int:
    """The most CPU threads that may be asked for."""
    return max(64, THREADS_PER_CPU * (os.cpu_count() or 1))


def is_memory_error(error: BaseException) -> bool:
    """Whether torch or Python found no memory for what was asked of it."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _MEMORY_ERRORS)
    )
