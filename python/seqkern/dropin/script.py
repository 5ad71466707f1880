"""Running somebody's script or module as Python itself would, with acceleration in force."""

from __future__ import annotations

import builtins
import io
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import BuiltinImporter, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any

from seqkern.dropin.accelerating import accelerate
from seqkern.dropin.counts import Counts, counting, table
from seqkern.errors import UserError


def prepare_script(script: Path, args: Sequence[str], report: bool) -> Callable[[], int]:
    """What runs `script` with `args` as `python script args` does.

    That is: `sys.argv`, `sys.path[0]` and `__main__` are the script's, and its exceptions pass
    through with tracebacks that begin in it, so that the interpreter ends as it would have.

    Args:
        script: a Python file, or a folder or zip file with `__main__.py` in it.
        args: its arguments.
        report: print at the end, on stderr, which calls ran on our kernels and which did not.

    Raises:
        UserError: the file cannot be read.
    """
    if script.is_dir() or _is_archive(script):

        def run_folder() -> None:
            sys.argv = [str(script), *args]
            # Under -P there is no folder of ours to replace, and Python adds theirs all the same.
            sys.path[: int(_adds_a_path())] = [os.path.abspath(script)]
            _new_main()
            _run_as_main("__main__", alter_argv=False)

        return _accelerated(run_folder, report)

    try:
        with io.open_code(str(script)) as file:
            source = file.read()
    except OSError as error:
        raise UserError(f"cannot read {script}: {error.strerror}") from error

    path = os.path.abspath(script)

    def run_file() -> None:
        sys.argv = [str(script), *args]
        if _adds_a_path():
            sys.path[0] = str(script.resolve().parent)
        main = _new_main()
        main.__dict__.update(
            __file__=path, __loader__=SourceFileLoader("__main__", path), __cached__=None
        )
        exec(_compile(source, path), main.__dict__)

    return _accelerated(run_file, report)


def prepare_module(module: str, args: Sequence[str], report: bool) -> Callable[[], int]:
    """What runs a module as `python -m module args` does; otherwise as `prepare_script`."""

    def run_module() -> None:
        sys.argv = ["-m", *args]  # until it is found, as Python has it
        if _adds_a_path():
            sys.path[0] = os.getcwd()
        _new_main()
        _run_as_main(module, alter_argv=True)

    return _accelerated(run_module, report)


def _accelerated(program: Callable[[], None], report: bool) -> Callable[[], int]:
    def run() -> int:
        with counting() as counts, accelerate():
            try:
                program()
            except SystemExit:
                raise
            except BaseException:
                _hide_our_frames(program)
                raise
            finally:
                if report:
                    _print(counts)
        return 0

    return run


def _run_as_main(module: str, alter_argv: bool) -> None:
    """What the interpreter calls for `-m`, folders and archives; its frames are in tracebacks."""
    runpy._run_module_as_main(module, alter_argv=alter_argv)  # type: ignore[attr-defined]


def _adds_a_path() -> bool:
    """Whether Python puts the program's folder before the path: not under -P and -I (3.11)."""
    return not getattr(sys.flags, "safe_path", False)


def _is_archive(script: Path) -> bool:
    """Whether Python would look for `__main__.py` in a file, as it does in a zip file."""
    if not script.is_file():
        return False
    import zipimport

    try:
        zipimport.zipimporter(str(script))
    except zipimport.ZipImportError:
        return False
    return True


def _new_main() -> ModuleType:
    main = ModuleType("__main__")
    main.__dict__.update(__loader__=BuiltinImporter, __builtins__=builtins)
    if sys.version_info < (3, 14):  # from there on made where they are asked for
        main.__dict__.update(__annotations__={})
    sys.modules["__main__"] = main
    return main


def _compile(source: bytes, path: str) -> CodeType:
    start = source.find(b"\0")
    if start >= 0:
        # `compile` says neither file nor line, as Python does, which reads line by line.
        before = source[:start].decode(errors="replace").splitlines(keepends=True) or [""]
        if before[-1].endswith("\n"):
            before.append("")
        where: Any = (path, len(before), None, before[-1])
        raise SyntaxError("source code cannot contain null bytes", where)
    return compile(source, path, "exec", dont_inherit=True)


def _print(counts: Counts) -> None:
    sys.stdout.flush()
    print(table(counts), file=sys.stderr, flush=True)


def _hide_our_frames(program: Callable[[], None]) -> None:
    """Let the hook that shows an uncaught exception see the program's frames alone."""
    hook = sys.excepthook
    ours = (program.__code__, _compile.__code__, _run_as_main.__code__)

    def show(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        inner = traceback
        while inner is not None and inner.tb_frame.f_code is not program.__code__:
            inner = inner.tb_next
        while inner is not None and inner.tb_frame.f_code in ours:
            inner = inner.tb_next
        hook(kind, error.with_traceback(inner), inner)

    sys.excepthook = show
