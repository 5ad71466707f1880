"""Translates the PTX that nvcc made of the kernels into C++, for the host emulator
(docs/emulator.md).

    python translate.py kernels.ptx --out DIRECTORY --parts 4

writes kernels.1.cpp to kernels.4.cpp. Registers become local variables of their bits, branches
become goto, and an instruction `mul.wide.s32 %rd1, %r2, %r3` becomes
`put(rd1_, mul_wide<s32>(as<s32>(r2_), as<s32>(r3_)))`, whose meaning stands in ptx.h. What ptx.h
does not know, the C++ compiler refuses.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from kernel_cpp import Writer, identifier
from ptx_text import Kernel, Module, Untranslatable, read


def demangled(names: list[str]) -> list[str]:
    """As binutils writes them, which names no compiler's anonymous namespaces."""
    found = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return found.stdout.splitlines()


def write(module: Module, stem: str, out: Path, parts: int) -> None:
    """Each kernel to the part that has the fewest lines so far."""
    texts = [(k, Writer(module, k).write()) for k in module.kernels]
    names = dict(
        zip(
            (k.name for k in module.kernels),
            demangled([k.name for k in module.kernels]),
            strict=True,
        )
    )
    shares: list[list[tuple[Kernel, str]]] = [[] for _ in range(parts)]
    lines = [0] * parts
    for kernel, text in sorted(texts, key=lambda t: -len(t[1])):
        i = lines.index(min(lines))
        shares[i].append((kernel, text))
        lines[i] += text.count("\n")
    for i, share in enumerate(shares):
        symbols = [identifier(s) for s, (size, _) in module.shared.items() if size]
        head = ['#include "ptx.h"', "", "namespace seqkern::emulator::ptx {", "namespace {", ""]
        head += [f"[[maybe_unused]] char shared_{s};" for s in symbols]
        tail = ["", "}  // namespace", ""]
        for number, (kernel, _) in enumerate(share):
            name = names[kernel.name]
            registration = f'registered_{number}("{name}", {identifier(kernel.name)});'
            tail.append(f"[[maybe_unused]] static const Registered {registration}")
        tail += ["", "}  // namespace seqkern::emulator::ptx", ""]
        path = out / f"{stem}.{i + 1}.cpp"
        path.write_text("\n".join([*head, *(t for _, t in share), '#line 1 "registry"', *tail]))


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
