"""Results as a table for the terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.registry import Benchmark
from benchmarks.runner import Result
from benchmarks.timing import Spread

COLUMNS = ("peer", "time", "IQR", "speed-up", "quartiles", "rate", "of ceiling", "error")


def seconds_text(seconds: float) -> str:
    """`358 ms`, `12.3 us`: three digits in the unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds / 1e-9)} ns"


def _digits(value: float) -> str:
    return (
        f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    )


def rate(result: Result, bound: str) -> float | None:
    """GB/s or GFLOP/s, whichever the op is shown in."""
    return result.gbs if bound == "bytes" else result.gflops


def rate_unit(bound: str) -> str:
    """Unit of `rate`."""
    return "GB/s" if bound == "bytes" else "GFLOP/s"


def table(results: Sequence[Result], bound: str) -> str:
    """Aligned columns, one line per case and peer; the speed-up is over the first peer."""
    head: tuple[str, ...] = ("case", *COLUMNS[:5], rate_unit(bound), *COLUMNS[6:])
    with_memory = any(result.peak is not None for result in results)
    if with_memory:
        head = (*head, "peak memory")
    lines: list[tuple[str, ...]] = [head]
    last = None
    for result in results:
        line: tuple[str, ...] = (result.case if result.case != last else "", *_cells(result, bound))
        if with_memory:
            line = (*line, "" if result.peak is None else f"{result.peak / 1e6:.1f} MB")
        lines.append(line)
        last = result.case
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    # Names to the left, numbers to the right.
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cells(result: Result, bound: str) -> tuple[str, ...]:
    error = "" if result.error is None else f"{result.error:.1e}"
    if result.seconds is None:
        return (result.peer, result.status.upper(), "", "", "", "", "", error)
    speedup, own_rate = result.speedup, rate(result, bound)
    assert own_rate is not None
    assert result.of_ceiling is not None
    return (
        result.peer,
        seconds_text(result.seconds.median),
        f"{result.seconds.relative_iqr:.1%}",
        f"{speedup.median:.2f}x" if speedup else "",
        f"{speedup.q1:.2f}..{speedup.q3:.2f}" if speedup and not result.baseline else "",
        f"{own_rate:.3g}" if own_rate < 100 else f"{own_rate:.0f}",
        f"{result.of_ceiling:.1%}",
        error,
    )


def stem(benchmark: Benchmark, mode: str, dtype: str) -> str:
    """File name without its ending: `cross_entropy-forward+backward-float32`."""
    return f"{benchmark.op}-{mode}-{dtype}"


def _spread(prefix: str, spread: Spread | None) -> dict[str, float | None]:
    names = ("median", "q1", "q3", "minimum")
    return {f"{prefix}_{name}": getattr(spread, name) if spread else None for name in names}


def row(result: Result) -> dict[str, Any]:
    """One flat record: sizes, times in seconds, rates and how it was measured."""
    return {
        "op": result.op,
        "mode": result.mode,
        "dtype": result.dtype,
        "case": result.case,
        **result.sizes,
        "peer": result.peer,
        "status": result.status,
        "message": result.message,
        "relative_error": result.error,
        **_spread("seconds", result.seconds),
        **_spread("speedup", result.speedup),
        "gb_per_s": result.gbs,
        "gflop_per_s": result.gflops,
        "of_ceiling": result.of_ceiling,
        "floor_seconds": result.floor,
        "floor_bytes": result.cost.bytes,
        "floor_flops": result.cost.flops,
        "rounds": result.rounds,
        "repetitions": result.repetitions,
        "peak_bytes": result.peak,
    }


def write_csv(path: Path, results: Sequence[Result], machine: dict[str, Any]) -> None:
    """One line per case and peer; the last columns say where and when it was measured."""
    extra = {
        "machine": machine["title"],
        "torch": machine["versions"].get("torch"),
        "commit": machine["commit"],
        "date": machine["date"],
    }
    rows = [row(result) | extra for result in results]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_json(
    path: Path, results: Sequence[Result], machine: dict[str, Any], settings: dict[str, Any]
) -> None:
    """The same with the whole record of the machine and of how it was measured."""
    rows = [row(result) | {"cost": asdict(result.cost)} for result in results]
    for record in rows:
        # JSON knows no infinity; the status already says that the result was wrong.
        if record["relative_error"] == float("inf"):
            record["relative_error"] = None
    content = {"machine": machine, "settings": settings, "results": rows}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
