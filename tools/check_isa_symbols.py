"""Reject weak symbols outside the namespace of their instruction set, in the objects of a build.

A template compiled for AVX-512 in one object and for everyone in another is one symbol to the
linker, which keeps either copy: on an older processor the wrong one is an illegal instruction. So
an ISA object may define weak symbols only inside seqkern::cpu::<isa>.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ISA_OBJECT = re.compile(r"cpu_(baseline|avx2|avx512|avx512_bf16|amx)\.dir")


def offenders(path: Path, isa: str) -> list[str]:
    listing = subprocess.run(
        ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
    ).stdout
    weak = (line.split(maxsplit=2) for line in listing.splitlines())
    return [
        name
        for _, kind, name in (fields for fields in weak if len(fields) == 3)
        if kind in "VvWwu" and f"seqkern::cpu::{isa}::" not in name
    ]


def main(build: Path) -> int:
    objects = [(path, ISA_OBJECT.search(str(path))) for path in build.rglob("*.o")]
    checked = [(path, match[1]) for path, match in objects if match]
    if not checked:
        print(f"{build}: no ISA objects found; build first", file=sys.stderr)
        return 2
    bad = [(path, name) for path, isa in checked for name in offenders(path, isa)]
    for path, name in bad:
        print(f"{path}: weak symbol {name}", file=sys.stderr)
    print(f"{len(checked)} ISA objects, {len(bad)} weak symbols outside their namespace")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
