"""Running somebody's script as Python itself would, with acceleration in force."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType

from seqkern.dropin.accelerating import accelerate
from seqkern.dropin.counts import Counts, counting, table
from seqkern.errors import UserError


def prepare_script(script: Path, args: Sequence[str], report: bool) -> Callable[[], int]:
    """What runs `script` with `args` as `python script args` does.

    That is: `sys.argv`, `sys.path[0]` and `__main__` are the script's, and its exceptions pass
    through with tracebacks that begin in it, so that the interpreter ends as it would have.

    Args:
        script: a Python file.
        args: its arguments.
        report: print at the end, on stderr, which calls ran on our kernels and which did not.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with io.open_code(str(script)) as file:
            source = file.read()
    except OSError as error:
        raise UserError(f"cannot read {script}: {error.strerror}") from error

    path = os.path.abspath(script)

    def run() -> int:
        sys.argv = [str(script), *args]
        if not getattr(sys.flags, "safe_path", False):  # Python 3.11 has it
            sys.path[0] = str(script.resolve().parent)
        main = ModuleType("__main__")
        main.__file__ = path
        main.__loader__ = SourceFileLoader("__main__", path)
        main.__dict__.update(__builtins__=__builtins__, __cached__=None, __annotations__={})
        sys.modules["__main__"] = main
        with counting() as counts, accelerate():
            try:
                exec(_compile(source, path), main.__dict__)
            except SystemExit:
                raise
            except BaseException:
                _hide_our_frames()
                raise
            finally:
                if report:
                    _print(counts)
        return 0

    return run


def _compile(source: bytes, path: str) -> CodeType:
    return compile(source, path, "exec", dont_inherit=True)


def _print(counts: Counts) -> None:
    sys.stdout.flush()
    print(table(counts), file=sys.stderr, flush=True)


def _hide_our_frames() -> None:
    """Let the hook that shows an uncaught exception see the script's frames alone."""
    hook = sys.excepthook

    def show(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        while traceback is not None and traceback.tb_frame.f_code is not _RUN:
            traceback = traceback.tb_next
        inner = None if traceback is None else traceback.tb_next
        if inner is not None and inner.tb_frame.f_code is _compile.__code__:  # a SyntaxError
            inner = None
        hook(kind, error.with_traceback(inner), inner)

    sys.excepthook = show


# The code of `run` above, whose frame stands just outside of the script's.
_RUN = next(
    constant
    for constant in prepare_script.__code__.co_consts
    if isinstance(constant, CodeType) and constant.co_name == "run"
)
