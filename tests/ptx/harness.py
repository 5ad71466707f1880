"""Kernels of a test: translated, compiled, and launched in the emulator."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray

Array = NDArray[Any]
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"


def translate(ptx: Path) -> subprocess.CompletedProcess[str]:
    """Writes the C++ beside it."""
    return subprocess.run(
        [sys.executable, HERE / "translate.py", ptx, "--out", ptx.parent],
        capture_output=True,
        text=True,
    )


def compile_kernels(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """By the compiler that built the emulator, as its CMakeLists.txt has them compiled."""
    flags = ["-std=c++20", "-O1", "-g1", "-w", "-fPIC"]
    flags += ["-fwrapv", "-fno-strict-aliasing", "-ffp-contract=off"]
    flags += [f"-I{path}" for path in (HERE, ROOT / "tests/emulator/include", ROOT / "csrc")]
    compiler = os.environ.get("CXX", "c++").split()
    return subprocess.run([*compiler, *flags, *args], capture_output=True, text=True)


def build(text: str, folder: Path) -> ctypes.CDLL:
    """A library of the kernels in the text."""
    runtime = ROOT / "build" / "emulator" / "libptx_harness.a"
    if not runtime.exists():
        pytest.fail(f"{runtime} is not built; run `make emulator`", pytrace=False)
    ptx, library = folder / "kernels.ptx", folder / "kernels.so"
    ptx.write_text(text)
    for made in (
        translate(ptx),
        compile_kernels(
            "-shared", "-o", library, folder / "kernels.1.cpp",
            "-Wl,--whole-archive", runtime, "-Wl,--no-whole-archive",
        ),
    ):  # fmt: skip
        assert made.returncode == 0, made.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.seqkern_ptx_run.restype = ctypes.c_char_p
    return loaded


def launch(
    library: ctypes.CDLL, name: str, *arrays: Array, threads: int, blocks: int = 1
) -> str | None:
    """Runs a kernel on arrays; what ended it, if something did."""
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    parameters = (ctypes.c_void_p * len(arrays))(*(ctypes.addressof(p) for p in pointers))
    said = library.seqkern_ptx_run(name.encode(), blocks, threads, 0, int(blocks > 1), parameters)
    return said.decode() if said else None
