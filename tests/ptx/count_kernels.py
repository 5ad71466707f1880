"""What kernels do, counted in the emulator from what nvcc compiled: instructions, passes over shared
memory's banks, sectors of global memory. Not times: no GPU is needed, and none is measured.

    make ptx && python tests/ptx/count_kernels.py [CASE...]

A line of a source is shown where its accesses take more passes or sectors than their bytes need.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from seqkern import ops
from seqkern.ops import _registry

LIBRARY = Path(__file__).parents[2] / "build" / "emulator" / "libseqkern_ptx.so"
CLASSES = ["free", "int", "int64", "float", "double", "convert", "special", "shared", "global",
           "warp", "matrix", "barrier"]  # fmt: skip


def gradient(f: Callable[[], torch.Tensor]) -> None:
    f().sum().backward()


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def losses(N: int, V: int, dtype: torch.dtype, grad: bool) -> Callable[[], None]:
    logits, target = randn(N, V, dtype=dtype, grad=grad), torch.randint(V, (N,))
    if grad:
        return lambda: gradient(lambda: ops.cross_entropy(logits, target))
    return lambda: ops.cross_entropy(logits, target)


def attention(B: int, H: int, T: int, D: int, grad: bool, **options: Any) -> Callable[[], None]:
    q, k, v = (randn(B, H, T, D, dtype=torch.bfloat16, grad=grad) for _ in range(3))
    if grad:
        return lambda: gradient(lambda: ops.causal_attention(q, k, v, **options))
    return lambda: ops.causal_attention(q, k, v, **options)


def step(B: int, NH: int, NKV: int, L: int, D: int) -> Callable[[], None]:
    q = randn(B, NH, 1, D, dtype=torch.bfloat16)
    k, v = (randn(B, NKV, 1, D, dtype=torch.bfloat16) for _ in range(2))
    caches = [randn(B, NKV, L, D, dtype=torch.bfloat16) for _ in range(2)]
    positions = torch.full((B,), L - 1)
    return lambda: ops.attention_step(q, k, v, *caches, positions)


def lstm(B: int, T: int, H: int, dtype: torch.dtype, grad: bool) -> Callable[[], None]:
    from seqkern import nn

    layer = nn.LSTM(H, H).to(dtype)
    x = randn(T, B, H, dtype=dtype)
    if grad:
        return lambda: gradient(lambda: layer(x)[0])

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    return forward


B16, F32 = torch.bfloat16, torch.float32
CASES: dict[str, Callable[[], Callable[[], Any]]] = {
    "cross_entropy": lambda: losses(4, 50257, B16, False),
    "cross_entropy_fp32": lambda: losses(4, 32000, F32, False),
    "cross_entropy_backward": lambda: losses(4, 50257, B16, True),
    "attention_64": lambda: attention(1, 1, 512, 64, False),
    "attention_128": lambda: attention(1, 1, 512, 128, False),
    "attention_backward_64": lambda: attention(1, 1, 256, 64, True),
    "attention_backward_128": lambda: attention(1, 1, 256, 128, True),
    "attention_step": lambda: step(1, 8, 1, 1024, 128),
    "attention_step_1": lambda: step(1, 2, 2, 1024, 64),
    "softmax": lambda: lambda: ops.softmax(randn(4, 50257, dtype=B16)),
    "sample_greedy": lambda: lambda: ops.sample(randn(2, 131072), temperature=0.0),
    "sample_top": lambda: lambda: ops.sample(randn(2, 131072), top_k=50, top_p=0.95),
    "lstm": lambda: lstm(8, 4, 256, B16, False),
    "lstm_backward": lambda: lstm(8, 4, 256, B16, True),
    "linear_step": lambda: lambda: ops.linear_step(
        randn(4, 768, dtype=B16), randn(3072, 768, dtype=B16)
    ),
}


def symbols() -> dict[int, str]:
    found = subprocess.run(
        ["nm", "-C", "--defined-only", LIBRARY], capture_output=True, text=True, check=True
    )
    names = {}
    for line in found.stdout.splitlines():
        at, kind, name = line.split(" ", 2)
        if kind in "tTwW":
            names.setdefault(int(at, 16), name)
    return names


def lines(addresses: list[int]) -> dict[int, str]:
    if not addresses:
        return {}
    found = subprocess.run(
        ["addr2line", "-e", LIBRARY], input="\n".join(hex(a) for a in addresses),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    places = (line.split(" ")[0].rsplit("/", 1)[-1] for line in found.stdout.splitlines())
    return dict(zip(addresses, places, strict=True))


def show(kernel: dict[str, Any], names: dict[int, str]) -> None:
    name = names[kernel["kernel"]].replace("seqkern::", "").replace("(anonymous namespace)::", "")
    name = name.replace("void ", "", 1).replace("cuda::", "").split("(")[0]
    executed = dict(zip(CLASSES, kernel["executed"], strict=True))
    warps = {c: n / 32 for c, n in executed.items() if n}
    print(f"  {name}: {kernel['launches']} launches; instructions of warps:")
    print("    " + ", ".join(f"{c} {n:,.0f}" for c, n in warps.items() if c != "free"))
    read, written = kernel["sectors_read"] * 32, kernel["sectors_written"] * 32
    print(f"    global memory: {read:,} bytes read, {written:,} written")
    by_line: dict[tuple[str, bool, bool, int], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    at = lines([s["at"] for s in kernel["sites"]])
    for s in kernel["sites"]:
        row = by_line[at[s["at"]], bool(s["shared"]), bool(s["write"]), s["bytes"]]
        for i, key in enumerate(("warps", "lanes", "passes", "least")):
            row[i] += s[key]
    for shared in (True, False):
        totals = [sum(r[i] for k, r in by_line.items() if k[1] == shared) for i in range(4)]
        if totals[0]:
            unit = "passes" if shared else "sectors"
            where = "shared" if shared else "global"
            print(f"    {where}: {totals[0]:,} accesses of warps, {totals[2]:,} {unit}, least {totals[3]:,}")
        for (place, is_shared, write, size), row in sorted(by_line.items(), key=lambda r: r[1][3] - r[1][2]):
            extra = row[2] - row[3]
            if is_shared == shared and extra > max(0.02 * totals[2], 8):
                verb = "write" if write else "read"
                print(f"      {place}: {verb} of {size} bytes: {row[0]:,} warps, {row[1] / row[0]:.1f} lanes, "
                      f"{row[2] / row[0]:.2f} {unit} each, least {row[3] / row[0]:.2f}")  # fmt: skip


def main() -> None:
    """See the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    args = parser.parse_args()
    for case in args.cases:
        if case not in CASES:
            parser.error(f"CASE: expected one of {', '.join(CASES)}, got {case}")
    if not LIBRARY.exists():
        parser.exit(2, f"{LIBRARY} is not built; run `make ptx`\n")
    warnings.filterwarnings("ignore")
    torch.ops.load_library(str(LIBRARY))
    _registry.register_all("seqkern_emu")
    library = ctypes.CDLL(str(LIBRARY))
    library.seqkern_ptx_counts.restype = ctypes.c_char_p
    library.seqkern_emu_set_device(132, 227 * 1024, 1)
    names = symbols()
    for case in args.cases or CASES:
        torch.manual_seed(0)
        run = CASES[case]()
        library.seqkern_ptx_count(1)
        with _registry.use_namespace("seqkern_emu"):
            run()
        print(case)
        for kernel in json.loads(library.seqkern_ptx_counts()):
            show(kernel, names)
    library.seqkern_ptx_count(0)


if __name__ == "__main__":
    main()
