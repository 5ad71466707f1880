"""Ctrl-C while the command `seqkern` is still importing, which takes seconds.

Imports nothing large: it comes first.
"""

from __future__ import annotations

import os
import signal
import sys
from types import TracebackType


class quietly:
    """Within the block Ctrl-C ends the command as its own handler would; a program's is its own."""

    def __enter__(self) -> None:
        """Enter the block."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave it, or the process."""
        if isinstance(error, KeyboardInterrupt) and _is_the_command():
            print("seqkern: interrupted", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None


def _is_the_command() -> bool:
    """Whether this process is `seqkern ...` or `python -m seqkern ...`, not another program.

    A package that -m names is imported while sys.argv[0] is "-m" still.
    """
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":
        at = sys.orig_argv.index("-m") if "-m" in sys.orig_argv else -1
        return at >= 0 and sys.orig_argv[at + 1 : at + 2] == ["seqkern"]
    main = os.path.join("seqkern", "__main__.py")
    return os.path.basename(program) in ("seqkern", "seqkern.exe") or program.endswith(main)
