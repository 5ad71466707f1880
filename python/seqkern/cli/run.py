"""`seqkern run`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seqkern.dropin.script import prepare_script


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "run",
        help="run a PyTorch script with seqkern's kernels under it",
        description="Run an unmodified script as `python SCRIPT.py ARGS...` would, with "
        "seqkern.accelerate in force from its first line: the same arguments, exit code and "
        "tracebacks. Processes that the script starts itself run plain. Memory that the script "
        "frees stays with its process; any setting of malloc's in the environment (MALLOC_..., "
        "GLIBC_TUNABLES) leaves malloc as it says.",
    )
    parser.set_defaults(command=_run)
    parser.add_argument(
        "--report",
        action="store_true",
        help="print at the end which calls ran on seqkern's kernels, how often, and which did not "
        "and why",
    )
    parser.add_argument("script", type=Path, metavar="SCRIPT.py", help="what to run")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")


def _run(args: argparse.Namespace) -> Callable[[], int]:
    return prepare_script(args.script, args.args, args.report)
