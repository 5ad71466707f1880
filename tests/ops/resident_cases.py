"""What the tests of the resident kernels share: the emulator as devices of several sizes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seqkern.ops import _registry

KB = 1024
T16 = [torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Device:
    """What the emulator is told to be."""

    multiprocessors: int = 4
    shared_bytes: int = 227 * KB
    cooperative: bool = True
    major: int = 8  # compute capability


@pytest.fixture
def library(emulator_library: Path) -> Iterator[ctypes.CDLL]:
    loaded = ctypes.CDLL(str(emulator_library))
    loaded.seqkern_emu_set_seed.argtypes = [ctypes.c_uint64]
    loaded.seqkern_emu_launches.restype = ctypes.c_uint64
    with _registry.use_namespace("seqkern_emu"):
        yield loaded
    set_device(loaded, Device())
    loaded.seqkern_emu_set_seed(0)


def set_device(library: ctypes.CDLL, device: Device) -> None:
    library.seqkern_emu_set_device(
        device.multiprocessors, device.shared_bytes, int(device.cooperative)
    )
    library.seqkern_emu_set_compute_capability(device.major)


def in_double(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [t if t is None else t.double() for t in tensors]


def assert_near(found: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """How near 16 bits come to the float64 reference is the concern of the accuracy rule's tests,
    so a few of their roundings are allowed here."""
    tolerance = (4 if dtype in T16 else 64) * torch.finfo(dtype).eps
    for actual, truth in zip(found, exact, strict=True):
        scale = max(1.0, truth.abs().max().item())
        torch.testing.assert_close(actual.double(), truth, rtol=0, atol=tolerance * scale)
