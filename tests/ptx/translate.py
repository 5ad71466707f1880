"""Translates the PTX that nvcc made of the kernels into C++, for the host emulator
(docs/emulator.md).

    python translate.py kernels.ptx --out DIRECTORY --parts 4

writes kernels.1.cpp to kernels.4.cpp. Registers become local variables of their bits, branches
become goto, and an instruction `mul.wide.s32 %rd1, %r2, %r3` becomes
`put(rd1_, mul_wide<s32>(as<s32>(r2_), as<s32>(r3_)))`, whose meaning stands in ptx.h. What ptx.h
does not know, the C++ compiler refuses. kernels.blocks.json says which instructions of which lines
the kernels' counters count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

from kernel_cpp import Writer, identifier
from ptx_text import Module, Untranslatable, read


def demangled(names: list[str]) -> list[str]:
    """As binutils writes them, which names no compiler's anonymous namespaces."""
    found = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return found.stdout.splitlines()


def write(module: Module, stem: str, out: Path, parts: int) -> None:
    """Each kernel to the part that has the fewest lines so far, and what their counters count."""
    writers = [Writer(module, kernel) for kernel in module.kernels]
    texts = [writer.write() for writer in writers]
    names = demangled([kernel.name for kernel in module.kernels])
    shares: list[list[int]] = [[] for _ in range(parts)]
    lines = [0] * parts
    for number in sorted(range(len(texts)), key=lambda n: -len(texts[n])):
        i = lines.index(min(lines))
        shares[i].append(number)
        lines[i] += texts[number].count("\n")
    symbols = [identifier(s) for s, (size, _) in module.shared.items() if size]
    for i, share in enumerate(shares):
        head = ['#include "ptx.h"', "", "namespace seqkern::emulator::ptx {", "namespace {", ""]
        head += [f"[[maybe_unused]] char shared_{s};" for s in symbols]
        tail = ["", "}  // namespace", ""]
        for n in share:
            writer = writers[n]
            given = f'"{names[n]}", {identifier(writer.kernel.name)}, {writer.counters}'
            registration = f"registered_{n}({given}, {len(writer.blocks)});"
            tail.append(f"[[maybe_unused]] static const Registered {registration}")
        tail += ["", "}  // namespace seqkern::emulator::ptx", ""]
        path = out / f"{stem}.{i + 1}.cpp"
        path.write_text("\n".join([*head, *(texts[n] for n in share), '#line 1 "registry"', *tail]))
    blocks = {
        name: [[[*what, count] for what, count in block.items()] for block in writer.blocks]
        for name, writer in zip(names, writers, strict=True)
    }
    (out / f"{stem}.blocks.json").write_text(json.dumps(blocks))


def main() -> None:
    """See the module's description."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ptx", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        write(read(args.ptx.read_text()), args.ptx.stem, args.out, args.parts)
    except Untranslatable as reason:
        parser.exit(2, f"{args.ptx}: cannot translate {reason}\n")


if __name__ == "__main__":
    main()
