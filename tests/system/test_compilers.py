"""cmake/compiler.cmake: which C++ compilers a build takes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MODULE = Path(__file__).parents[2] / "cmake" / "compiler.cmake"


def configure(name: str, version: str) -> subprocess.CompletedProcess[str]:
    cmake = shutil.which("cmake")
    assert cmake, "the build needs it, too"
    found = {"COMPILER_ID": name, "COMPILER_VERSION": version, "COMPILER": "/usr/bin/c++"}
    options = [f"-DCMAKE_CXX_{key}={value}" for key, value in found.items()]
    return subprocess.run(
        [cmake, *options, "-P", str(MODULE)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("name", "version"), [("GNU", "10.2.1"), ("Clang", "13.0.1")])
def test_an_old_compiler_is_named(name: str, version: str) -> None:
    done = configure(name, version)
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "seqkern needs g++ 11 or clang 14 or newer" in said
    assert f"/usr/bin/c++ is {name} {version}" in said


@pytest.mark.parametrize(
    ("name", "version"),
    [("GNU", "11.2.0"), ("GNU", "15.1.0"), ("Clang", "14.0.6"), ("AppleClang", "16.0.0")],
)
def test_others_are_taken(name: str, version: str) -> None:
    assert configure(name, version).returncode == 0
