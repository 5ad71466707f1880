"""Results as a picture: time, speed-up over the baseline, and rate beside the measured ceiling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.machine import Ceilings
from benchmarks.registry import Benchmark
from benchmarks.report import rate, rate_unit, seconds_text
from benchmarks.runner import Result
from benchmarks.timing import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers and in grey print; ours is the blue.
COLOURS = ("#7f7f7f", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
MARKERS = ("o", "D", "s", "^", "v", "P", "X")


def write_png(
    path: Path,
    benchmark: Benchmark,
    results: Sequence[Result],
    machine: str,
    ceilings: Ceilings,
    gemm: float,
) -> None:
    """Draw the results of one mode and dtype; `gemm` is the ceiling where FLOP/s are shown.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(result.case for result in results))
    peers = list(dict.fromkeys(result.peer for result in results))
    height = 1.9 + len(cases) * max(0.34, 0.17 * len(peers))
    figure = Figure(figsize=(14, height), layout="constrained")
    FigureCanvasAgg(figure)
    time_axes, speed_axes, rate_axes = figure.subplots(1, 3, sharey=True)
    mode, dtype = results[0].mode, results[0].dtype
    figure.suptitle(f"{benchmark.op}, {mode}, {dtype}   ({machine})", fontsize=13)

    step = 0.8 / len(peers)  # each peer has its own height within a case
    for number, peer in enumerate(peers):
        own = [r for r in results if r.peer == peer]
        timed = [r for r in own if r.seconds]
        heights = {c: y - 0.4 + step * (number + 0.5) for y, c in enumerate(cases)}
        places = [heights[r.case] for r in timed]
        colour, marker = COLOURS[number % 7], MARKERS[number % 7]
        spreads = [r.seconds for r in timed if r.seconds]
        time_axes.errorbar(
            [s.median for s in spreads], places, xerr=_reach(spreads), fmt=marker, color=colour
        )
        _bars(speed_axes, own, heights, step, colour)
        rates = [rate(r, benchmark.bound) for r in timed]
        rate_axes.plot(rates, places, linestyle="none", marker=marker, color=colour, label=peer)

    time_axes.set(xscale="log", xlabel="time per call (median, quartiles)", ylabel=benchmark.axes)
    time_axes.set_yticks(range(len(cases)), cases)
    time_axes.set_ylim(len(cases) - 0.5, -0.5)
    speed_axes.axvline(1, color=COLOURS[0], linewidth=1.5)
    longest = max((r.speedup.q3 for r in results if r.speedup), default=1.0)
    speed_axes.set_xlim(0, 1.3 * max(longest, 1.0))  # room for the longest bar's label
    speed_axes.set_xlabel(f"times faster than {peers[0]} (line: {peers[0]}; longer is better)")
    bytes_bound = benchmark.bound == "bytes"
    limit, what = (ceilings.copy, "copy") if bytes_bound else (gemm, "GEMM")
    work = "bytes" if bytes_bound else "operations"
    label = f"{what} on this machine: {limit / 1e9:.3g} {rate_unit(benchmark.bound)}"
    rate_axes.axvline(limit / 1e9, color="black", linestyle="--", linewidth=1.2, label=label)
    rate_axes.set(xscale="log", xlabel=f"{rate_unit(benchmark.bound)} (least needed {work} / time)")
    for axes, text in ((time_axes, _tick), (rate_axes, "{:g}".format)):
        places = ticks(*axes.get_xlim())
        axes.set_xticks(places, [text(place) for place in places])
        axes.set_xticks([], minor=True)
    for axes in (time_axes, speed_axes, rate_axes):
        axes.grid(axis="x", color="0.88")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        for edge in range(1, len(cases)):
            axes.axhline(edge - 0.5, color="0.94", linewidth=0.8, zorder=0)
    handles, labels = rate_axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=110)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis: the densest kind of which it holds at most five."""
    places: list[float] = []
    sparse = ((10, 15, 20, 30, 40, 60, 80), (10, 20, 50), (10,))
    for digits in (*(range(10, 100, step) for step in (1, 2, 5)), *sparse):
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)))
        places = [float(f"{d}e{decade}") for decade in decades for d in digits]
        places = [place for place in places if low <= place <= high]
        if len(places) <= 5:
            return places
    return places[:: math.ceil(len(places) / 5)]


def _reach(spreads: Sequence[Spread]) -> list[list[float]]:
    """Distances of the quartiles from the median, as matplotlib's error bars want them."""
    return [[s.median - s.q1 for s in spreads], [s.q3 - s.median for s in spreads]]


def _bars(
    axes: Axes, results: Sequence[Result], heights: dict[str, float], step: float, colour: str
) -> None:
    """One peer's speed-ups; what was not timed says why, in the place of its bar."""
    for result in results:
        y = heights[result.case]
        if result.seconds is None:
            axes.text(0, y, f" {result.status.upper()}", va="center", color="#c00000", fontsize=8)
            continue
        time, spread = seconds_text(result.seconds.median), result.speedup
        if spread is None:  # the baseline itself was not timed
            axes.text(0, y, f" {time}", va="center", fontsize=8)
            continue
        axes.barh([y], [spread.median], step * 0.9, color=colour)
        text = time
        if not result.baseline:
            axes.errorbar([spread.median], [y], xerr=_reach([spread]), color="black", capsize=2)
            text = f"{spread.median:.2f}x  {time}"
        axes.annotate(
            text,
            (spread.q3, y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )


def _tick(seconds: float) -> str:
    """`10 us`; a tick needs no decimals."""
    number, unit = seconds_text(seconds).split()
    return f"{float(number):g} {unit}"
