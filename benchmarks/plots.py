"""Results as a picture: time, speed-up over the baseline, and rate beside the measured ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import Ceilings
from benchmarks.registry import Benchmark
from benchmarks.report import rate, rate_unit, seconds_text
from benchmarks.runner import Result

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
    height = 1.9 + len(cases) * max(0.34, 0.16 * len(peers))
    figure = Figure(figsize=(14, height), layout="constrained")
    FigureCanvasAgg(figure)
    time_axes, speed_axes, rate_axes = figure.subplots(1, 3, sharey=True)
    mode, dtype = results[0].mode, results[0].dtype
    figure.suptitle(f"{benchmark.op}, {mode}, {dtype}   ({machine})", fontsize=13)

    for number, peer in enumerate(peers):
        own = [r for r in results if r.peer == peer and r.seconds]
        style: dict[str, Any] = {"color": COLOURS[number % 7], "label": peer}
        _dots(time_axes, own, cases, MARKERS[number % 7], style)
        if number:
            _bars(speed_axes, own, cases, peers, number, style)
        shown = [(cases.index(r.case), rate(r, benchmark.bound)) for r in own]
        places, rates = [y for y, _ in shown], [x for _, x in shown]
        rate_axes.plot(rates, places, linestyle="none", marker=MARKERS[number % 7], **style)

    time_axes.set(xscale="log", xlabel="time per call (median, quartiles)", ylabel=benchmark.axes)
    time_axes.set_yticks(range(len(cases)), cases)
    time_axes.set_ylim(len(cases) - 0.5, -0.5)
    speed_axes.axvline(1, color=COLOURS[0], linewidth=1.5)
    speed_axes.set_xlim(left=0)
    speed_axes.margins(x=0.22)
    speed_axes.set_xlabel(f"times faster than {peers[0]} (line: {peers[0]}; longer is better)")
    limit, what = (ceilings.copy, "copy") if benchmark.bound == "bytes" else (gemm, "GEMM")
    label = f"{what} on this machine: {limit / 1e9:.3g} {rate_unit(benchmark.bound)}"
    rate_axes.axvline(limit / 1e9, color="black", linestyle="--", linewidth=1.2, label=label)
    rate_axes.set(xscale="log", xlabel=f"{rate_unit(benchmark.bound)} of the least needed work")
    time_axes.xaxis.set_major_formatter(lambda seconds, _: seconds_text(seconds))
    rate_axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
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


def _dots(
    axes: Axes, results: Sequence[Result], cases: list[str], marker: str, style: dict[str, Any]
) -> None:
    for result in results:
        assert result.seconds is not None
        spread = result.seconds
        reach = [[spread.median - spread.q1], [spread.q3 - spread.median]]
        y = cases.index(result.case)
        axes.errorbar([spread.median], [y], xerr=reach, fmt=marker, capsize=2, **style)


def _bars(
    axes: Axes,
    results: Sequence[Result],
    cases: list[str],
    peers: list[str],
    number: int,
    style: dict[str, Any],
) -> None:
    """The bars of peer `number`; the first peer, the baseline, has none."""
    width = 0.8 / (len(peers) - 1)
    for result in results:
        if result.speedup is None or result.seconds is None:
            continue
        spread = result.speedup
        y = cases.index(result.case) - 0.4 + width * (number - 0.5)
        reach = [[spread.median - spread.q1], [spread.q3 - spread.median]]
        axes.barh([y], [spread.median], width * 0.92, xerr=reach, capsize=2, **style)
        text = f" {spread.median:.2f}x, {seconds_text(result.seconds.median)}"
        axes.text(spread.q3, y, text, va="center", ha="left", fontsize=8)
