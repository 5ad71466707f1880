"""Writing files so that a crash leaves the old content or the new, never a piece of it."""

import os
from collections.abc import Callable
from pathlib import Path


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
