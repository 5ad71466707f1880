"""benchmarks.page writes docs/performance.md from the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import page


def record(peer: str, seconds: float | None, speedup: float | None, **more: Any) -> dict[str, Any]:
    return {
        "op": "softmax",
        "mode": "forward",
        "dtype": "float32",
        "case": "4x16",
        "N": 4,
        "V": 16,
        "peer": peer,
        "status": "ok" if seconds else "failed",
        "seconds_median": seconds,
        **{f"speedup_{name}": speedup for name in ("median", "q1", "q3")},
        "of_ceiling": 0.5 if seconds else None,
        **more,
    }


def write(folder: Path, records: list[dict[str, Any]], gpu: str | None = None) -> None:
    machine = {
        "title": "A machine",
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.13.0"},
        "gpu": gpu,
        "ceilings": {"copy": 25e9, "gemm": {"float32": 100e9}},
    }
    (folder / "machine").mkdir(exist_ok=True)
    path = folder / "machine" / f"softmax-forward-{gpu}.json"
    path.write_text(json.dumps({"machine": machine, "results": records}))


def test_a_table(tmp_path: Path) -> None:
    write(tmp_path, [record("torch", 2e-3, 1.0), record("seqkern", 1e-3, 2.0)])
    text = page.page(tmp_path)
    assert "## A machine" in text
    assert "copy 25 GB/s, float32 GEMM 100 GFLOP/s" in text
    assert "### softmax: N x V" in text
    assert (
        "| 4x16 | float32 | forward | 2.00 ms | 1.00 ms | **2.00** | 2.00 to 2.00 | 50% |" in text
    )
    assert "2026-01-02, torch 2.13.0" in text
    assert "No GPU has been measured" in text


def test_failures_memory_and_gpus_are_said(tmp_path: Path) -> None:
    write(
        tmp_path,
        [record("torch", None, None), record("seqkern", 1e-3, None, peak_bytes=3_000_000)],
        gpu="a GPU",
    )
    text = page.page(tmp_path)
    assert "| failed | 1.00 ms |  |  | 50% | -, 3 |" in text
    assert "No GPU has been measured" not in text


def test_the_page_is_what_the_results_say() -> None:
    assert page.main(["--check"]) == 0
