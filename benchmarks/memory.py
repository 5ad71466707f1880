"""Peak memory of one step beyond the gradients it leaves, as the device counts it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_PROC = Path("/proc/self")


def peak_extra(step: Callable[[], object], device: torch.device, gradients: int) -> int | None:
    """Largest memory in use during `step`, less that before it and less `gradients` bytes.

    On CUDA what torch's allocator has handed out; on Linux the resident size, after memory that
    earlier calls freed was given back. None where neither can be counted.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before - gradients
    if not (_PROC / "clear_refs").exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    (_PROC / "clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before - gradients


def _resident(field: str) -> int:
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)
