"""Writing files so that a crash leaves the old content or the new, never a piece of it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from seqkern.errors import UserError, require


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries (names made, renamed or replaced) are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then put it in the place of `path` at once."""
    beside = path.with_name(f".{path.name}.new{path.suffix}")
    write(beside)
    os.replace(beside, path)


def replace_content(path: Path, content: bytes) -> None:
    """Replace a file's content at once, and wait until it is on the disk."""
    replace_file(path, lambda beside: write_durably(beside, content))
    sync_folder(path.parent)


def replace_link(path: Path, target: str) -> None:
    """Make `path` a symbolic link to `target` at once, whatever it was unless a folder."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    os.replace(beside, path)


def require_new_folder(path: Path) -> None:
    """Raise `UserError` unless `path` is free for a folder: not there, or an empty folder."""
    if path.exists() or path.is_symlink():
        require(path.is_dir(), f"{path} is not a folder")
        first = next((entry.name for entry in sorted(path.iterdir())), None)
        require(first is None, f"{path} already holds files ({first}): give another --out")


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Make a folder that is whole or not there: `write` fills one beside it, which then takes its
    name. `UserError` where the name is taken or the disk refuses.
    """
    require_new_folder(path)
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.mkdir(parents=True)
        try:
            write(beside)
            for file in beside.iterdir():
                sync_file(file)
            os.replace(beside, path)
        except BaseException:
            shutil.rmtree(beside)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
