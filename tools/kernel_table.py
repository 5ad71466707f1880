"""What each kernel takes of a multiprocessor, as ptxas reports it: no GPU is needed.

`kernel_table.py compile nvcc ...` runs the compiler (CMake calls it as a launcher) and keeps its
report beside the object; `kernel_table.py show BUILD_DIR` prints the kernels of all reports as one
table and fails where one spills registers to memory.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SUFFIX = ".ptxas"


@dataclass(frozen=True)
class Kernel:
    """One __global__ function, compiled for one architecture."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spilled: int

    @property
    def row(self) -> tuple[str, ...]:
        """The cells of its line in the table."""
        numbers = (self.registers, self.shared, self.stack, self.spilled)
        return (self.name, self.architecture, *map(str, numbers))


HEADER = ("kernel", "arch", "registers", "shared bytes", "stack bytes", "spilled bytes")


def compile_and_keep(command: list[str]) -> int:
    """Run the compiler; its report goes to `OBJECT.ptxas`, the rest of its output through."""
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    report: list[str] = []
    rest: list[str] = []
    for line in result.stderr.splitlines(keepends=True):
        of_ptxas = line.startswith("ptxas info") or re.match(r"\s+\d+ bytes stack frame", line)
        (report if of_ptxas else rest).append(line)
    sys.stderr.write("".join(rest))
    if "-o" in command and result.returncode == 0:
        Path(command[command.index("-o") + 1] + _SUFFIX).write_text("".join(report))
    return result.returncode


def parse(report: str) -> Iterator[Kernel]:
    """The kernels of one report, with mangled names."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<architecture>\w+)'"
        r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores,"
        r" (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<used>[^\n]*)",
        re.DOTALL,
    )
    for found in pattern.finditer(report):
        shared = re.search(r"(\d+) bytes smem", found["used"])
        yield Kernel(
            name=found["name"],
            architecture=found["architecture"],
            registers=int(found["registers"]),
            shared=int(shared[1]) if shared else 0,
            stack=int(found["stack"]),
            spilled=max(int(found["stores"]), int(found["loads"])),
        )


def demangle(names: list[str]) -> list[str]:
    """Readable names, where binutils are installed."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    out = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    readable = []
    for name in out.stdout.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|seqkern::(cuda::)?", "", name)
        name = re.sub(r"\([^()]*\)$", "", name.removeprefix("void "))  # parameters
        readable.append(name.replace("(bool)1", "true").replace("(bool)0", "false"))
    return readable


def show(build: Path, may_spill: str) -> int:
    """Print the table; 1 if a kernel spills that may not, or if there is no report at all."""
    raw = [
        kernel for path in sorted(build.rglob("*" + _SUFFIX)) for kernel in parse(path.read_text())
    ]
    if not raw:
        print(f"kernel_table: no reports under {build}", file=sys.stderr)
        return 1
    names = demangle([kernel.name for kernel in raw])
    kernels = [
        Kernel(name, k.architecture, k.registers, k.shared, k.stack, k.spilled)
        for name, k in zip(names, raw, strict=True)
    ]
    kernels.sort(key=lambda kernel: (kernel.name, kernel.architecture))
    rows = [HEADER, *(kernel.row for kernel in kernels)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    for name, *numbers in rows:
        aligned = [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *aligned]))
    accepted = re.compile(may_spill) if may_spill else None
    spilling = [k for k in kernels if k.spilled and not (accepted and accepted.search(k.name))]
    for kernel in spilling:
        print(f"kernel_table: {kernel.name} spills on sm_{kernel.architecture}", file=sys.stderr)
    return 1 if spilling else 0


def main() -> int:
    """Command line."""
    if sys.argv[1:2] == ["compile"]:
        return compile_and_keep(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["show"])
    parser.add_argument("build", type=Path)
    parser.add_argument(
        "--may-spill", default="", help="pattern of kernels whose spills are accepted"
    )
    arguments = parser.parse_args()
    return show(arguments.build, arguments.may_spill)


if __name__ == "__main__":
    sys.exit(main())
