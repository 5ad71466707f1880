"""The scripts of tests/scripts, plain and under `seqkern run`: `python -m benchmarks.run_scripts`.

Each script prints the speed of its own training loop, imports and data left out. The two ways take
turns; medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent / "tests" / "scripts"
# `seqkern run` has malloc keep freed memory, which a plain script can be given, too.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
WAYS = {
    "plain": ([sys.executable], {}),
    "plain, memory kept": ([sys.executable], KEPT),
    "seqkern run": ([sys.executable, "-m", "seqkern", "run"], {}),
}


def speed(way: str, script: str, arguments: list[str]) -> float:
    """Tokens per second of one run of a script."""
    python, variables = WAYS[way]
    result = subprocess.run(
        [*python, str(SCRIPTS / script), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"(\d+) tokens/s", result.stderr)
    assert found is not None, result.stderr
    return float(found[1])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scripts", nargs="*", default=sorted(p.name for p in SCRIPTS.glob("*.py")))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    print(f"| tokens/s, median of {args.rounds} | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}")
    for script in args.scripts:
        speeds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way in WAYS:
                speeds[way].append(speed(way, script, ["--steps", str(args.steps)]))
        medians = {way: statistics.median(speeds[way]) for way in WAYS}
        cells = (f"{m:,.0f} ({m / medians['plain']:.2f})" for m in medians.values())
        print(f"| {script} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
