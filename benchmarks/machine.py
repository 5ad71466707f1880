"""What the numbers were measured on: machine, versions, and the ceilings the machine reaches."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.timing import Call, Timer, timer_for

PACKAGES = (
    "torch",
    "seqkern",
    "numpy",
    "triton",
    "liger-kernel",
    "flash-attn",
    "flashinfer-python",
)
# Settings of the environment that change what is measured.
SWITCHES = re.compile(r"(SEQKERN|OMP|KMP|GOMP|MKL|MALLOC|GLIBC|PYTORCH|CUDA)_\w+|LD_PRELOAD")


@dataclass(frozen=True)
class Ceilings:
    """Measured bests: `copy` and `read` in bytes per second (a copy counts bytes read and written),
    `gemm` in floating operations per second by dtype name.
    """

    copy: float
    read: float
    gemm: dict[str, float]

    def gemm_for(self, dtype: torch.dtype) -> float:
        """The GEMM of this dtype where one was measured, else of bf16 (for fp16) or fp32."""
        half = self.gemm.get("bfloat16") if dtype == torch.float16 else None
        return self.gemm.get(dtype_name(dtype)) or half or self.gemm["float32"]


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _best(timer: Timer, call: Call, repeats: int) -> float:
    """Least seconds of a call: a ceiling is what the machine reaches undisturbed."""
    timer.sample(call, 1)
    return min(timer.sample(call, 1) for _ in range(repeats))


def measure_ceilings(
    device: torch.device, *, copy_bytes: int | None = None, gemm_size: int | None = None
) -> Ceilings:
    """Bandwidth of a large copy and of a large sum, and the speed of square GEMMs.

    Args:
        device: where.
        copy_bytes: size of each of the copy's two buffers of random numbers. Default: eight times
            the last-level cache and at least 256 MiB on a CPU, 1 GiB on a GPU.
        gemm_size: side of the matrices. Default: 2048 on a CPU (fp32), 8192 on a GPU (bf16, fp32).
    """
    gpu = device.type == "cuda"
    timer = timer_for(device)
    if copy_bytes is None:
        copy_bytes = 1 << 30 if gpu else max(8 * last_level_cache(), 256 << 20)
    size = gemm_size or (8192 if gpu else 2048)
    source = torch.rand(copy_bytes // 4, device=device)
    target = torch.rand_like(source)
    moved = source.nbytes
    copy = 2 * moved / _best(timer, partial(target.copy_, source), 7)
    read = moved / _best(timer, source.sum, 7)
    del source, target
    gemm = {}
    for dtype in (torch.bfloat16, torch.float32) if gpu else (torch.float32,):
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        seconds = _best(timer, partial(torch.mm, a, b, out=out), 5)
        gemm[dtype_name(dtype)] = 2 * size**3 / seconds
    return Ceilings(copy, read, gemm)


def last_level_cache() -> int:
    """Bytes of the first CPU's largest cache; 64 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]])
    return max(sizes, default=64 << 20)


class OtherLoad:
    """Share of the CPUs' time that other programs took since this was made (None if unknown).

    The virtual machine's neighbours count as well: stolen time is in it.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def _now(self) -> tuple[float, float, float] | None:
        """Seconds of wall time, of all CPUs being busy, and of this process and its children."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, sum(os.times()[:4])

    def share(self) -> float | None:
        """Between 0 and 1."""
        now = self._now()
        if now is None or self._start is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        available = wall * (os.cpu_count() or 1)
        return min(max((busy - own) / available, 0.0), 1.0) if available > 0 else None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _huge_pages() -> str:
    """The chosen word of `always [madvise] never`."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    found = re.search(r"\[(\w+)\]", path.read_text()) if path.exists() else None
    return found[1] if found else "unknown"


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _commit() -> str | None:
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    # Results are being written while this runs; they do not change what is measured.
    changed = _output(
        "git", "status", "--porcelain", "--untracked-files=no", "--", "..", ":!results"
    )
    return f"{commit} with changes" if commit and changed else commit


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _build() -> dict[str, str] | None:
    """What seqkern's own library says of itself; None where there is none."""
    try:
        library = importlib.import_module("seqkern._C")
    except ImportError:
        return None
    return {"cpu_isa": library.cpu_isa(), **library.build_info()}


def _gpu(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = _output(*query)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
    }


def describe(device: torch.device, ceilings: Ceilings) -> dict[str, object]:
    """Everything that is recorded with each result, ready for JSON."""
    # Base names only: where a library or a toolkit lies is no property of a measurement.
    switches = {
        name: os.path.basename(value)
        for name, value in sorted(os.environ.items())
        if SWITCHES.fullmatch(name)
    }
    return {
        "title": title(device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": {
            "model": _cpu_model(),
            "architecture": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": _memory_gib(),
            "last_level_cache_mib": round(last_level_cache() / 2**20, 1),
            "transparent_huge_pages": _huge_pages(),
        },
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "versions": _versions(),
        "seqkern_build": _build(),
        "environment": switches,
        "ceilings": asdict(ceilings),
    }


def title(device: torch.device) -> str:
    """Name of the machine for people: `AMD EPYC (AVX2), 2 threads` or `NVIDIA H200`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    # Processors of several generations share a name; the vectors they have tell them apart.
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{_cpu_model()} ({vectors}), {threads} thread{'s' if threads > 1 else ''}"


def folder_name(device: torch.device) -> str:
    """The title as a folder's name: `amd-epyc-avx2-2-threads`."""
    return re.sub(r"[^a-z0-9]+", "-", title(device).lower()).strip("-")
