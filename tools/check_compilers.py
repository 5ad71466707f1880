"""Whether the sources are C++ to other compilers than the one that builds here.

The oldest g++ that a supported system has (Ubuntu 22.04: 11), and clang. Syntax and templates; no
code is made.

    python tools/check_compilers.py BUILD      a folder of CMake's, with its compile_commands.json
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

COMPILERS = ("g++-11", "clang++")


def commands(build: Path, compiler: str) -> Iterator[list[str]]:
    """Those of the build, for each source and instruction set, with another compiler."""
    for entry in json.loads((build / "compile_commands.json").read_text()):
        if "csrc" not in Path(entry["file"]).parts:
            continue
        words = shlex.split(entry["command"])
        first = next(i for i, word in enumerate(words) if word.startswith("-"))
        out = words.index("-o")
        kept = words[first:out] + words[out + 2 :]
        # Warnings are for the compiler at hand: not all know of the same ones.
        yield [compiler, *(w for w in kept if not w.startswith("-W")), "-w", "-fsyntax-only"]


def failure(command: list[str]) -> str:
    """What the compiler says, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def main() -> int:
    """Exit status 1 if a compiler that is installed takes offence."""
    build = Path(sys.argv[1])
    bad = False
    for compiler in COMPILERS:
        if shutil.which(compiler) is None:
            print(f"no {compiler}: NOT checked against it")
            continue
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(failure, commands(build, compiler)))
        failures = [text for text in results if text]
        bad = bad or bool(failures)
        print(f"{compiler}: {len(results) - len(failures)} of {len(results)} compilations")
        for text in failures:
            print("\n".join(text.splitlines()[:8]))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
