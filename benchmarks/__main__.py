"""`python -m benchmarks [OP...]`: measure ops beside the peers that are installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.machine import (
    Ceilings,
    OtherLoad,
    describe,
    dtype_name,
    folder_name,
    measure_ceilings,
    title,
)
from benchmarks.plots import write_png
from benchmarks.registry import Benchmark, Case, Peer, discover
from benchmarks.report import stem, table, write_csv, write_json
from benchmarks.runner import OK, Result, Settings, available, run_case
from benchmarks.timing import timer_for

RESULTS = Path(__file__).parent / "results"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Share of all CPU time taken by others above which a run is called disturbed.
DISTURBED = 0.03
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


class Parser(argparse.ArgumentParser):
    """argparse, with one line for a wrong argument."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return value


def _dtype(text: str) -> torch.dtype:
    name = SHORT.get(text, text)
    if name not in DTYPES:
        known = ", ".join((*SHORT, *DTYPES))
        raise argparse.ArgumentTypeError(f"must be one of {known}, got {text!r}")
    return DTYPES[name]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to measure (default: all)")
    parser.add_argument("--list", action="store_true", help="list ops, cases and peers, and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype", type=_dtype, action="append", help="repeatable (default: the op's own list)"
    )
    parser.add_argument(
        "--peers", type=_names, metavar="A,B", help="only these, the first is the baseline"
    )
    parser.add_argument("--cases", type=_names, metavar="AxB,...", help="only these, e.g. 2048x512")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes and short times: a trial"
    )
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--seconds-per-case", type=_seconds, metavar="S", help="default 5, with --quick 0.2"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for results (default: benchmarks/results, where only whole runs are kept)",
    )
    return parser


@dataclass(frozen=True)
class Plan:
    """What to run for one op."""

    benchmark: Benchmark
    cases: tuple[Case, ...]
    dtypes: tuple[torch.dtype, ...]
    peers: tuple[Peer, ...]


def make_plan(benchmark: Benchmark, options: argparse.Namespace, parser: Parser) -> Plan:
    """Choose cases, dtypes and peers as the options say; wrong names end the program."""
    op = benchmark.op
    known_dtypes = (*benchmark.dtypes, *benchmark.more_dtypes)
    for dtype in options.dtype or ():
        if dtype not in known_dtypes:
            names = ", ".join(map(dtype_name, known_dtypes))
            parser.error(f"argument --dtype: {op} has {names}, got {dtype_name(dtype)}")
    every = benchmark.cases + (benchmark.cuda_cases if options.device == "cuda" else ())
    cases = benchmark.quick if options.quick else every
    if options.cases:
        by_name = {str(case): case for case in (*benchmark.quick, *every)}
        for name in options.cases:
            if name not in by_name:
                parser.error(f"argument --cases: {op} has {', '.join(by_name)}, got {name!r}")
        cases = tuple(by_name[name] for name in options.cases)
    peers = tuple(peer for peer in benchmark.peers if not peer.optional)
    if options.peers:
        by_peer = {peer.name: peer for peer in benchmark.peers}
        for name in options.peers:
            if name not in by_peer:
                parser.error(f"argument --peers: {op} has {', '.join(by_peer)}, got {name!r}")
        peers = tuple(by_peer[name] for name in options.peers)
    return Plan(benchmark, cases, tuple(options.dtype or benchmark.dtypes), peers)


def listing(benchmarks: dict[str, Benchmark]) -> str:
    """What `--list` prints."""
    lines = []
    for op, benchmark in benchmarks.items():
        optional = {True: " (only by --peers)", False: ""}
        peers = ", ".join(peer.name + optional[peer.optional] for peer in benchmark.peers)
        dtypes = ", ".join(map(dtype_name, (*benchmark.dtypes, *benchmark.more_dtypes)))
        lines += [
            op,
            f"  cases {benchmark.axes}: {', '.join(map(str, benchmark.cases))}",
            f"  on a GPU also: {', '.join(map(str, benchmark.cuda_cases)) or 'none'}",
            f"  quick: {', '.join(map(str, benchmark.quick))}",
            f"  modes: {', '.join(benchmark.modes)}",
            f"  dtypes: {dtypes}",
            f"  peers: {peers}",
        ]
    return "\n".join(lines)


def run(
    plan: Plan, settings: Settings, ceilings: Ceilings, keep: Callable[[list[Result]], None]
) -> dict[tuple[str, str], list[Result]]:
    """Measure a plan; results by mode and dtype, given to `keep` as they grow."""
    benchmark = plan.benchmark
    found: dict[tuple[str, str], list[Result]] = {}
    rng = torch.Generator(settings.device).manual_seed(settings.seed)
    trial = benchmark.make(benchmark.quick[0], plan.dtypes[0], settings.device, rng)
    peers, missing = available(plan.peers, trial)
    for name, reason in missing.items():
        print(f"    {benchmark.op}: {name} is not measured: {reason}")
    if not peers:
        return found
    for peer in peers:
        if peer.note:
            print(f"    {benchmark.op}: {peer.name} {peer.note}")
    for dtype in plan.dtypes:
        for case in plan.cases:
            results = run_case(
                benchmark, case, dtype, peers, benchmark.modes, settings, ceilings, print
            )
            for result in results:
                found.setdefault((result.mode, result.dtype), []).append(result)
            for key in {(result.mode, result.dtype) for result in results}:
                keep(found[key])
    return found


def save_numbers(
    folder: Path,
    plan: Plan,
    results: Sequence[Result],
    machine: dict[str, object],
    settings: dict[str, object],
) -> Path:
    """Write CSV and JSON of one mode and dtype; their path without its ending."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / stem(plan.benchmark, results[0].mode, results[0].dtype)
    write_csv(path.with_suffix(".csv"), results, machine)
    write_json(path.with_suffix(".json"), results, machine, settings)
    return path


def save_plot(
    path: Path,
    plan: Plan,
    results: Sequence[Result],
    machine: dict[str, object],
    ceilings: Ceilings,
) -> None:
    """Write the PNG beside CSV and JSON, and say so."""
    dtype = results[0].dtype
    endings = "csv, json, png"
    try:
        gemm = ceilings.gemm_for(DTYPES[dtype])
        name = f"{machine['title']}, torch {torch.__version__}"
        write_png(path.with_suffix(".png"), plan.benchmark, results, name, ceilings, gemm)
    except ImportError:
        endings = "csv, json; no plot: matplotlib is not installed"
    print(f"wrote {path}.({endings})")


def how(
    settings: Settings, options: argparse.Namespace, whole: bool, disturbed: float | None
) -> dict[str, object]:
    """How results were measured, for their JSON."""
    return {
        "seconds_per_case": settings.seconds,
        "seed": settings.seed,
        "quick": options.quick,
        "whole": whole,
        "cpu_share_of_others": disturbed,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 when a peer failed or gave a wrong result, 2 for wrong arguments."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    benchmarks = discover()
    for op in options.ops:
        if op not in benchmarks:
            parser.error(f"unknown op {op!r}; there are: {', '.join(benchmarks)}")
    if options.list:
        print(
            listing({op: b for op, b in benchmarks.items() if op in options.ops or not options.ops})
        )
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda is not available to this torch")
    if options.out and options.out.exists() and not options.out.is_dir():
        parser.error(f"argument --out: {options.out} is not a folder")
    plans = [make_plan(benchmarks[op], options, parser) for op in options.ops or benchmarks]
    if options.threads:
        torch.set_num_threads(options.threads)

    device = torch.device(options.device)
    if device.type == "cuda":
        # Off by default in torch's products, but not in its recurrent layers: like with like.
        torch.backends.cudnn.allow_tf32 = False
    print(f"machine: {title(device)}")
    ceilings = measure_ceilings(device)
    machine = describe(device, ceilings)
    gemms = ", ".join(f"{name} GEMM {v / 1e9:.4g} GFLOP/s" for name, v in ceilings.gemm.items())
    rates = f"copy {ceilings.copy / 1e9:.4g} GB/s, read {ceilings.read / 1e9:.4g} GB/s"
    print(f"ceilings: {rates}, {gemms}")

    settings = Settings(
        device, timer_for(device), options.seconds_per_case or (0.2 if options.quick else 5.0)
    )
    whole = not (options.quick or options.cases or options.peers)
    out = options.out or (RESULTS if whole else None)
    all_well = True
    for plan in plans:
        others = OtherLoad()

        def keep(results: list[Result], plan: Plan = plan, others: OtherLoad = others) -> None:
            """What a run that is ended from outside leaves; but it replaces no whole run."""
            if options.out:
                recorded = how(settings, options, False, others.share())
                save_numbers(options.out / folder_name(device), plan, results, machine, recorded)

        found = run(plan, settings, ceilings, keep)
        disturbed = others.share()
        for (mode, dtype), results in found.items():
            print(f"\n{plan.benchmark.op}, {mode}, {dtype} ({title(device)})")
            print(table(results, plan.benchmark.bound))
            all_well &= all(result.status == OK for result in results)
            if out:
                recorded = how(settings, options, whole, disturbed)
                path = save_numbers(out / folder_name(device), plan, results, machine, recorded)
                save_plot(path, plan, results, machine, ceilings)
        if disturbed is not None and disturbed > DISTURBED:
            print(f"!!! other programs took {disturbed:.0%} of the CPUs: do not trust these times")
    if not all_well:
        print("!!! some peers failed or gave wrong results; see above", file=sys.stderr)
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
