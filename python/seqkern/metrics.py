"""metrics.csv: one row per step, and TensorBoard beside it."""

import csv
import io
import os
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from seqkern.errors import UserError, missing_extra
from seqkern.files import replace_content


@dataclass(frozen=True)
class Row:
    """One step: the state after its update. Losses are in nats per token."""

    step: int
    tokens: int  # trained on so far
    train_loss: float | None  # of the step's batch, before its update
    val_loss: float | None  # of the held-out text, after the update
    learning_rate: float | None
    gradient_norm: float | None  # before clipping
    tokens_per_second: float | None  # training alone, without validation and saving


COLUMNS = [column.name for column in fields(Row)]


class MetricsLog:
    """Appends rows to metrics.csv.

    Args:
        path: the file.
        after_step: keep the rows of a former session up to this step (-1: none). Rows past the
            checkpoint it resumes from are dropped: those steps will be made again.
        tensorboard: folder for TensorBoard's events, or None.

    Raises:
        UserError: the file is damaged, or TensorBoard is not installed.
    """

    def __init__(self, path: Path, after_step: int = -1, tensorboard: Path | None = None) -> None:
        """See the class."""
        self._board = None if tensorboard is None else _board(tensorboard, after_step)
        kept = [row for row in read_metrics(path) if row.step <= after_step]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(_cells(row) for row in kept)
        replace_content(path, text.getvalue().encode())
        self._file = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115 (see `close`)
        self._writer = csv.writer(self._file, lineterminator="\n")

    def append(self, row: Row) -> None:
        """Write a row; `sync` makes it durable."""
        self._writer.writerow(_cells(row))
        if self._board is not None:
            for name, value in zip(COLUMNS[2:], astuple(row)[2:], strict=True):
                if value is not None:
                    self._board.add_scalar(name, value, row.step)

    def sync(self) -> None:
        """Wait until all rows are on the disk: a checkpoint must not be ahead of its metrics."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


class NoLog:
    """The log of a process that keeps none."""

    def append(self, row: Row) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.csv, [] where there is no file; a last row cut short is left out.

    Raises:
        UserError: the file has other columns, or damage before its last row.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    parsed = list(csv.reader(lines))
    try:
        if parsed and parsed[0] != COLUMNS:
            raise ValueError("columns")
        return [_row(cells) for cells in parsed[1:]]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: it is not a metrics.csv of seqkern's") from error


def _cells(row: Row) -> list[str]:
    """Floats with all their digits, so that what is read is what was written."""
    return ["" if value is None else repr(value) for value in astuple(row)]


def _row(cells: list[str]) -> Row:
    step, tokens, *numbers = cells
    return Row(int(step), int(tokens), *(float(cell) if cell else None for cell in numbers))


def _board(folder: Path, after_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise missing_extra("tensorboard", "tensorboard", "--tensorboard") from error
    return SummaryWriter(folder, purge_step=after_step + 1)
