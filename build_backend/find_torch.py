"""Locate an installed torch without importing it.

A build front end hides the target environment's packages from an isolated build. Only torch's
headers are needed, and they lie in the target environment's site-packages, so look there as well.
Printed as `DIR;CUDA` for CMake: the package folder, and the CUDA version torch was built with or
nothing.
"""

from __future__ import annotations

import importlib.util
import runpy
import site
import sys
import sysconfig
from pathlib import Path

MINIMUM = (2, 10)


def _folders() -> list[Path]:
    spec = importlib.util.find_spec("torch")
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    roots = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}
    config = Path(sys.prefix) / "pyvenv.cfg"
    sees_system = not config.exists() or "include-system-site-packages = true" in config.read_text()
    if sees_system:
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        roots |= {sysconfig.get_path(kind, vars=base) for kind in ("purelib", "platlib")}
        roots |= {*site.getsitepackages([sys.base_prefix]), site.getusersitepackages()}
    return folders + [Path(root) / "torch" for root in sorted(roots) if root]


def find_torch() -> tuple[Path, str] | None:
    """Folder and CUDA version (empty for a CPU build) of the first torch that is new enough."""
    for folder in _folders():
        version_file = folder / "version.py"
        if (
            not (folder / "include/torch/csrc/stable/library.h").exists()
            or not version_file.exists()
        ):
            continue
        about = runpy.run_path(str(version_file))
        release = tuple(int(part) for part in about["__version__"].split(".")[:2])
        if release >= MINIMUM:
            return folder, about.get("cuda") or ""
    return None


if __name__ == "__main__":
    found = find_torch()
    if found is None:
        sys.exit(
            f"seqkern: torch >= {MINIMUM[0]}.{MINIMUM[1]} is needed to build; none is installed"
        )
    print(f"{found[0]};{found[1]}", end="")
