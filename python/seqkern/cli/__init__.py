"""The command line `seqkern COMMAND`: one module per command, each with its `add(commands)`.

A mistake of the user's is one line on stderr and exit code 2 (`seqkern.errors.UserError`); an
interrupt is 130 (Ctrl-C) or, where training saved, 143 (SIGTERM).
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from seqkern._interrupt import quietly

with quietly():
    from seqkern.cli import (
        demo,
        doctor,
        evaluate,
        examples,
        forecast,
        generate,
        prepare,
        run,
        train,
    )
from seqkern.cli.memory import keep_freed_memory
from seqkern.errors import UserError
from seqkern.machine import is_memory_error

_COMMANDS = (prepare, train, generate, evaluate, examples, forecast, run, demo, doctor)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other mistake of the user's."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code.

    Args:
        argv: the command line; None: this process', which then is the command's own.
    """
    if argv is None:
        keep_freed_memory()
    # Text may hold characters that the terminal's encoding lacks.
    streams = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    errors = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        args = _parser().parse_args(argv)
        code: int | Callable[[], int] = args.command(args)
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))  # of torchrun's processes, which all say it
        process = f"process {rank}: " if rank else ""
        print(f"seqkern: {process}error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("seqkern: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        print(
            "seqkern: error: there is not enough memory for these sizes: take smaller ones",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:
        # The reader of our output has left; Python would complain again when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if not callable(code):
        return code
    # Somebody else's program: its streams, and its errors are not ours to report.
    for stream, before in zip(streams, errors, strict=True):
        stream.reconfigure(errors=before)
    return code()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="seqkern", description="Train sequence models and sample from them.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for command in _COMMANDS:
        command.add(commands)
    return parser
