"""`seqkern run`."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from seqkern.dropin.script import prepare_module, prepare_script
from seqkern.errors import require


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "run",
        help="run a PyTorch script with seqkern's kernels under it",
        usage="seqkern run [-h] [--report] (SCRIPT | -m MODULE) [ARGS ...]",
        description="Run an unmodified script or module as `python SCRIPT ARGS...` and `python -m "
        "MODULE ARGS...` would, with seqkern.accelerate in force from its first line: the same "
        "arguments, exit code and tracebacks. Processes that the script starts itself run plain. "
        "Memory that the script frees stays with its process; any setting of malloc's in the "
        "environment (MALLOC_..., GLIBC_TUNABLES) leaves malloc as it says. As under "
        "seqkern.accelerate, logits that the script changes in place between cross_entropy and its "
        "backward are an error: our backward reads them, where PyTorch's reads a copy.",
    )
    parser.set_defaults(command=_run)
    parser.add_argument(
        "--report",
        action="store_true",
        help="print at the end which calls ran on seqkern's kernels, how often, and which did not "
        "and why",
    )
    parser.add_argument("-m", metavar="MODULE", help="a module to run")
    parser.add_argument(
        "script",
        metavar="SCRIPT",
        nargs="?",
        help="a Python file, or a folder or zip file with __main__.py in it",
    )
    parser.add_argument("args", metavar="ARGS", nargs="*", help="its arguments")
    parse = parser.parse_known_args

    def parse_our_part(
        argv: Sequence[str], namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        # argparse takes options and -- out of what belongs to the program.
        ours = next((i for i, word in enumerate(argv) if _begins_program(word)), len(argv))
        parsed, extra = parse(argv[:ours], namespace)
        parsed.program = list(argv[ours:])
        return parsed, extra

    parser.parse_known_args = parse_our_part


def _begins_program(word: str) -> bool:
    return word.startswith("-m") or not word.startswith("-")


def _run(args: argparse.Namespace) -> Callable[[], int]:
    require(
        len(args.program) > 0,
        "what to run is missing: SCRIPT or -m MODULE (see seqkern run --help)",
    )
    first, *rest = args.program
    if not first.startswith("-m"):
        return prepare_script(Path(first), rest, args.report)
    module, *rest = [first[2:], *rest] if first != "-m" else rest or [""]
    require(module != "", "-m needs the name of a module (see seqkern run --help)")
    return prepare_module(module, rest, args.report)
