"""What tests of kernels in the emulator share: every op on it, and its settings."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from seqkern.ops import _registry


@pytest.fixture(scope="module")
def library(emulator_library: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(emulator_library))
    library.seqkern_emu_set_seed.argtypes = [ctypes.c_uint64]
    library.seqkern_emu_set_seed.restype = None
    library.seqkern_emu_set_compute_capability.argtypes = [ctypes.c_int]
    library.seqkern_emu_set_compute_capability.restype = None
    library.seqkern_emu_launches.restype = ctypes.c_uint64
    return library


@pytest.fixture
def emulated(library: ctypes.CDLL) -> Iterator[None]:
    with _registry.use_namespace("seqkern_emu"):
        yield


@pytest.fixture
def older_gpu(library: ctypes.CDLL) -> Iterator[None]:
    """One without the tensor cores' instructions that the kernels use."""
    library.seqkern_emu_set_compute_capability(7)
    yield
    library.seqkern_emu_set_compute_capability(8)
