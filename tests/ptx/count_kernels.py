"""What kernels do, counted in the emulator from what nvcc compiled: instructions, passes over
shared memory's banks, sectors of global memory. Not times: no GPU is needed, and none is measured.

    make ptx && python tests/ptx/count_kernels.py [CASE...] [--lines 10]

Instructions are a warp's, as PTX has them: what ptxas makes of them is something else. --lines
shows from which lines of the sources most of them come. Accesses are shown that take more passes
or sectors than their bytes need.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from seqkern import ops
from seqkern.ops import _registry

BUILD = Path(__file__).parents[2] / "build" / "emulator"
LIBRARY = BUILD / "libseqkern_ptx.so"


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
    "linear_step": lambda: (
        lambda: ops.linear_step(randn(4, 768, dtype=B16), randn(3072, 768, dtype=B16))
    ),
}


def pieces() -> dict[str, list[list[tuple[str, str, int]]]]:
    """What each kernel's counters count: lines, classes and numbers of instructions."""
    found = {}
    for path in (BUILD / "tests" / "ptx").glob("*.blocks.json"):
        found.update(json.loads(path.read_text()))
    return found


def places(addresses: list[int]) -> dict[int, str]:
    if not addresses:
        return {}
    text = "\n".join(hex(a) for a in addresses)
    found = subprocess.run(
        ["addr2line", "-e", LIBRARY], input=text, capture_output=True, text=True, check=True
    )
    lines = (line.split(" ")[0].rsplit("/", 1)[-1] for line in found.stdout.splitlines())
    return dict(zip(addresses, lines, strict=True))


def readable(name: str) -> str:
    for noise in ("seqkern::", "(anonymous namespace)::", "cuda::"):
        name = name.replace(noise, "")
    return name.removeprefix("void ").rpartition("(")[0]


def show_instructions(
    blocks: list[list[tuple[str, str, int]]], runs: list[int], lines: int
) -> None:
    classes: Counter[str] = Counter()
    by_line: Counter[tuple[str, str]] = Counter()
    for block, times in zip(blocks, runs, strict=True):
        for line, kind, count in block:
            if kind != "free":
                classes[kind] += count * times
                by_line[line, kind] += count * times
    print("    " + ", ".join(f"{kind} {n / 32:,.0f}" for kind, n in classes.most_common()))
    for (line, kind), n in by_line.most_common(lines):
        print(f"      {n / 32:12,.0f} {line} {kind}")


def show_accesses(sites: list[dict[str, Any]]) -> None:
    at = places([s["at"] for s in sites])
    by_line: dict[tuple[bool, str, str], Counter[str]] = defaultdict(Counter)
    for s in sites:
        what = f"{'write' if s['write'] else 'read'} of {s['bytes']} bytes"
        key = (bool(s["shared"]), at[s["at"]], what)
        by_line[key].update({k: s[k] for k in ("warps", "lanes", "passes", "least")})
    for shared, memory, unit in ((True, "shared", "passes"), (False, "global", "sectors")):
        rows = {key: row for key, row in by_line.items() if key[0] == shared}
        if not rows:
            continue
        total = sum(rows.values(), Counter[str]())
        print(
            f"    {memory} memory: {total['warps']:,} accesses of warps, "
            f"{total['passes']:,} {unit}, least {total['least']:,}"
        )
        for (_, line, what), row in sorted(
            rows.items(), key=lambda r: r[1]["least"] - r[1]["passes"]
        ):
            if row["passes"] - row["least"] > max(0.02 * total["passes"], 8):
                each = {k: row[k] / row["warps"] for k in ("lanes", "passes", "least")}
                print(
                    f"      {line}: {what}: {row['warps']:,} warps, {each['lanes']:.1f} lanes, "
                    f"{each['passes']:.2f} {unit} each, least {each['least']:.2f}"
                )


def main() -> None:
    """See the module's description."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--lines", type=int, default=0, help="of the sources, to show per kernel")
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
    blocks = pieces()
    for case in args.cases or CASES:
        torch.manual_seed(0)
        run = CASES[case]()
        library.seqkern_ptx_count(1)
        with _registry.use_namespace("seqkern_emu"):
            run()
        print(case)
        for kernel in json.loads(library.seqkern_ptx_counts()):
            name, read = kernel["kernel"], kernel["sectors_read"] * 32
            print(f"  {readable(name)}: {kernel['launches']} launches")
            print(f"    {read:,} bytes read, {kernel['sectors_written'] * 32:,} written")
            show_instructions(blocks[name], kernel["blocks"], args.lines)
            show_accesses(kernel["sites"])
    library.seqkern_ptx_count(0)


if __name__ == "__main__":
    main()
