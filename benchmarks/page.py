"""`python -m benchmarks.page [--check]`: docs/performance.md from the results that are kept."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.__main__ import DTYPES, RESULTS
from benchmarks.registry import FORWARD, FORWARD_BACKWARD
from benchmarks.report import seconds_text

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
OURS = "seqkern"
MODES = {FORWARD: "forward", FORWARD_BACKWARD: "with backward"}

HEAD = """# Performance

Medians of interleaved rounds in one process, as `python -m benchmarks` measures them
([how, and how to read it](benchmarks.md)). Ratio: the first peer's time divided by ours, taken
within each round, with its quartiles. Ceiling: what the bytes or operations that any
implementation needs would take at the copy bandwidth or the GEMM rate of this machine, in that run;
more than 100% means that data stayed in cache, or tiles faster than the library's GEMM, whose rate
on a CPU is float32's for all dtypes.
Written by `python -m benchmarks.page` from `benchmarks/results`, which has the rest of each run.
"""
NO_GPU = """
**No GPU has been measured yet.** CUDA kernels run in the host emulator and go through nvcc;
`make gpu-session` measures them all, unattended, and this page takes up what it finds.
"""


def row(records: Sequence[dict[str, Any]], peers: Iterable[str]) -> list[str]:
    """A case in one dtype and mode: each peer's time, our ratio, share of the ceiling, memory."""
    by_peer = {record["peer"]: record for record in records}
    times = []
    for peer in peers:
        record = by_peer.get(peer)
        seconds = record and record["seconds_median"]
        times.append(seconds_text(seconds) if seconds else record["status"] if record else "")
    ours = by_peer.get(OURS, {})
    ratio = quartiles = ceiling = ""
    if ours.get("speedup_median"):
        ratio = f"**{ours['speedup_median']:.2f}**"
        quartiles = f"{ours['speedup_q1']:.2f} to {ours['speedup_q3']:.2f}"
    if ours.get("of_ceiling"):
        ceiling = f"{ours['of_ceiling']:.0%}"
    memory = []
    if any(record["peak_bytes"] for record in records if "peak_bytes" in record):
        peaks = (by_peer.get(peer, {}).get("peak_bytes") for peer in peers)
        memory = [", ".join("-" if peak is None else f"{peak / 1e6:.0f}" for peak in peaks)]
    first = records[0]
    mode = MODES[first["mode"]]
    return [first["case"], first["dtype"], mode, *times, ratio, quartiles, ceiling, *memory]


def section(op: str, runs: Sequence[dict[str, Any]]) -> list[str]:
    """The table of an op on one machine."""
    records = [record for run in runs for record in run["results"]]
    peers = list(dict.fromkeys(record["peer"] for record in records))
    cases: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        cases.setdefault((record["dtype"], record["mode"], record["case"]), []).append(record)
    sizes = records[0]
    letters = list(sizes)[list(sizes).index("case") + 1 : list(sizes).index("peer")]
    head = ["case", "dtype", "mode", *peers, "ratio", "quartiles", "of ceiling"]
    if any(record.get("peak_bytes") for record in records):
        head.append("peak memory, MB, in the order of the times")
    lines = [f"\n### {op}: {' x '.join(letters)}\n", f"| {' | '.join(head)} |"]
    lines.append("|---|---|---|" + "--:|" * (len(head) - 3))
    dtypes, modes = list(DTYPES), list(MODES)
    order = sorted(cases, key=lambda key: (dtypes.index(key[0]), modes.index(key[1])))
    lines += [f"| {' | '.join(row(cases[key], peers))} |" for key in order]
    stamps = sorted({(r["machine"]["date"][:10], r["machine"]["versions"]["torch"]) for r in runs})
    return [*lines, "\n" + "; ".join(f"{date}, torch {torch}" for date, torch in stamps)]


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    lines = [HEAD]
    has_gpu = False
    for machine in sorted(path for path in results.iterdir() if path.is_dir()):
        runs: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(machine.glob("*.json")):
            run = json.loads(path.read_text())
            runs.setdefault(run["results"][0]["op"], []).append(run)
        if not runs:
            continue
        first = next(iter(runs.values()))[0]["machine"]
        has_gpu = has_gpu or first["gpu"] is not None
        ceilings = first["ceilings"]
        rates = [f"copy {ceilings['copy'] / 1e9:.0f} GB/s"]
        rates += [f"{name} GEMM {v / 1e9:.0f} GFLOP/s" for name, v in ceilings["gemm"].items()]
        lines.append(f"\n## {first['title']}\n\n{', '.join(rates)} in the first of these runs.")
        for op in sorted(runs):
            lines += section(op, runs[op])
    return "\n".join([lines[0] + ("" if has_gpu else NO_GPU), *lines[1:]]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.page", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    options = parser.parse_args(arguments)
    text = page()
    if not options.check:
        PAGE.write_text(text)
        return 0
    if PAGE.exists() and PAGE.read_text() == text:
        return 0
    print("docs/performance.md is not what benchmarks/results say: run python -m benchmarks.page")
    return 1


if __name__ == "__main__":
    sys.exit(main())
