"""Series from CSV and Parquet files and from arrays: numeric, finite, at a constant interval."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqkern.data.series.interval import Interval, Stamps, find_interval, pandas, places, stamp_text
from seqkern.errors import UserError, missing_extra, require

FILLS = ("linear", "last")


@dataclass(frozen=True)
class Series:
    """One series of D columns at constant steps, without gaps."""

    name: str  # of the series among several; "" for the only one
    columns: tuple[str, ...]
    values: Tensor  # [T, D] float64, finite
    stamps: Stamps  # [T]: datetimes or numbers; 0 .. T - 1 where none were given
    interval: Interval
    filled: int = 0  # steps that were missing and have been filled in

    def __len__(self) -> int:
        """T."""
        return len(self.values)

    def part(self, start: int, stop: int) -> "Series":
        """The steps from `start` to `stop`."""
        return replace(self, values=self.values[start:stop], stamps=self.stamps[start:stop])


def make_series(
    values: Any,
    stamps: Any = None,
    *,
    name: str = "",
    columns: Sequence[str] | None = None,
    fill: str | None = None,
) -> Series:
    """A series of an array, its interval checked.

    Args:
        values: [T] or [T, D] numbers, array or tensor; NaN is a gap.
        stamps: [T] increasing dates (datetime64) or numbers; None: the steps are 0 .. T - 1.
        name: what messages and files call the series.
        columns: names of the D columns, "0", "1", .. by default.
        fill: how to fill missing steps and values: `linear` between the neighbours in time, `last`
            value carried on, None not at all.

    Raises:
        UserError: gaps that are not to be filled or cannot be, stamps between two steps, infinite
            values, no step at all; the message names the first place.

    Example:
        >>> make_series([1.0, 2.0, 4.0], [2001, 2002, 2004], fill="linear").values[:, 0]
        tensor([1., 2., 3., 4.], dtype=torch.float64)
    """
    require(
        fill is None or fill in FILLS, f"fill must be None or one of {', '.join(FILLS)}, got {fill}"
    )
    array = np.asarray(values, dtype=np.float64)
    array = array[:, None] if array.ndim == 1 else array  # [T, D]
    what = f"series {name}" if name else "series"
    require(
        array.ndim == 2 and array.shape[1] >= 1,
        f"{what}: values must be [T] or [T, D], got {list(array.shape)}",
    )
    require(len(array) >= 2, f"{what}: at least 2 steps are needed, got {len(array)}")
    names = tuple(columns or (str(d) for d in range(array.shape[1])))
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    require(not twice, f"{what}: columns must be different, got {', '.join(twice)} more than once")
    require(
        len(names) == array.shape[1], f"{what}: {array.shape[1]} columns have {len(names)} names"
    )
    if stamps is None:
        stamps, interval = np.arange(len(array)), Interval(1.0, "1")
        _check_infinite(array, names, stamps, what)
    else:
        stamps = np.asarray(stamps)
        stamps = stamps.astype("datetime64[ns]") if stamps.dtype.kind == "M" else stamps
        require(
            stamps.shape == (len(array),) and stamps.dtype.kind in "Mif",
            f"{what}: stamps must be {len(array)} dates or numbers, got {stamps.dtype} "
            f"{list(stamps.shape)}",
        )
        interval = find_interval(stamps, what)
        _check_infinite(array, names, stamps, what)
        array, stamps = _complete(array, stamps, interval, what, fill)
    return _filled(Series(name, names, torch.from_numpy(array), stamps, interval), what, fill)


def _check_infinite(array: Any, columns: Sequence[str], stamps: Stamps, what: str) -> None:
    """Before gaps are looked for: those can be filled, this cannot."""
    infinite = np.isinf(array)
    if infinite.any():
        row, d = np.argwhere(infinite)[0]
        raise UserError(f"{what}: {columns[d]} is infinite at {stamp_text(stamps[row])}")


def _complete(
    array: Any, stamps: Stamps, interval: Interval, what: str, fill: str | None
) -> tuple[Any, Stamps]:
    """Rows of NaN for the steps that are not there."""
    expected, place = places(stamps, interval)
    if (place < 0).any():
        row, count = int((place < 0).argmax()), int((place < 0).sum())
        raise UserError(
            f"{what}: the interval is {interval.text}, but {stamp_text(stamps[row])} (row "
            f"{row + 1}) is between two steps; {count} of {len(stamps)} stamps are"
        )
    missing = np.ones(len(expected), bool)
    missing[place] = False
    if missing.any() and fill is None:
        raise UserError(
            f"{what}: {int(missing.sum())} of {len(expected)} steps are missing at an interval of "
            f"{interval.text}, the first is {stamp_text(expected[missing.argmax()])}: "
            f"fill them by {' or '.join(FILLS)}, or mend the data"
        )
    complete = np.full((len(expected), array.shape[1]), np.nan)
    complete[place] = array
    return complete, expected


def _filled(series: Series, what: str, fill: str | None) -> Series:
    """Without NaN."""
    array = series.values.numpy().copy()
    gaps = np.isnan(array)
    if not gaps.any():
        return series
    row, d = np.argwhere(gaps)[0]
    first = f"{series.columns[d]} at {stamp_text(series.stamps[row])}"
    if fill is None:
        raise UserError(
            f"{what}: {int(gaps.sum())} values are missing, the first is {first}: "
            f"fill them by {' or '.join(FILLS)}, or mend the data"
        )
    steps = np.arange(len(array))
    for d, name in enumerate(series.columns):
        known = steps[~gaps[:, d]]
        ends = (0, len(array) - 1) if fill == "linear" else (0,)
        for end in ends:
            require(
                not gaps[end, d],
                f"{what}: {name} is missing at {stamp_text(series.stamps[end])}, an end of the "
                f"series, where {fill} has nothing to fill it from",
            )
        if fill == "linear":
            array[:, d] = np.interp(steps, known, array[known, d])
        else:
            array[:, d] = array[known[np.searchsorted(known, steps, side="right") - 1], d]
    return replace(series, values=torch.from_numpy(array), filled=int(gaps.any(1).sum()))


def read_series(
    path: str | Path,
    columns: Sequence[str],
    *,
    time: str | None = None,
    group: str | None = None,
    fill: str | None = None,
) -> list[Series]:
    """The series of a CSV or Parquet file (by its ending: .parquet or .pq), read by pandas.

    Args:
        path: the file.
        columns: the numeric columns to read.
        time: the column of dates (as ISO 8601) or numbers; None: the rows are equidistant steps.
        group: the column that names each row's series; None: the file holds one series.
        fill: see `make_series`.

    Returns:
        The series in the order in which they first appear, each with its own stamps and length.

    Raises:
        UserError: a file that cannot be read or has no rows, a column that is not there or not
            numeric, or what `make_series` refuses. The message names file and first place.

    Example:
        >>> Path("demand.csv").write_text("day,y\\n2024-01-01,3\\n2024-01-02,4\\n")
        33
        >>> (series,) = read_series("demand.csv", ["y"], time="day")
        >>> series.interval.text, series.values.tolist()
        ('1 day', [[3.0], [4.0]])
    """
    table = _read(Path(path))
    require(len(table) > 0, f"{path} has no rows")
    for column in (*columns, *(name for name in (time, group) if name is not None)):
        known = ", ".join(str(name) for name in table.columns)
        require(column in table.columns, f"{path} has no column {column!r}: it has {known}")
    require(len(columns) >= 1, "columns must name at least one column")
    twice = [name for name in dict.fromkeys(columns) if list(columns).count(name) > 1]
    require(not twice, f"columns must be different, got {', '.join(twice)} more than once")
    numbers = np.stack([_numbers(table[column], str(path)) for column in columns], axis=1)
    stamps = None if time is None else _stamps(table[time], str(path))
    if group is None:
        rows = {"": np.arange(len(table))}
    else:
        require(not table[group].isna().any(), f"{path}: column {group} has rows without a name")
        keys = table[group].astype(str)
        rows = {key: np.flatnonzero(keys == key) for key in dict.fromkeys(keys)}
    try:
        return [
            make_series(
                numbers[where],
                None if stamps is None else stamps[where],
                name=name,
                columns=columns,
                fill=fill,
            )
            for name, where in rows.items()
        ]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _read(path: Path) -> Any:
    pd = pandas()
    parquet = path.suffix.lower() in (".parquet", ".pq")
    try:
        with open(path, "rb") as file:
            require(file.read(1) != b"", f"{path} is empty")
        if not parquet:
            return pd.read_csv(path, encoding="utf-8-sig")
        table = pd.read_parquet(path)
        # An index with a name is a column to whoever wrote it.
        return table if table.index.names == [None] else table.reset_index()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ImportError as error:
        raise missing_extra("pyarrow", "series", "reading Parquet") from error
    except UserError:
        raise
    except ValueError as error:  # what pandas and pyarrow raise is of this kind
        reason = " ".join(str(error).split())[:160]
        kind = "Parquet" if parquet else "CSV"
        raise UserError(f"{path} is not a {kind} file: {reason}") from error


def _numbers(column: Any, path: str) -> Any:
    """float64 [T]; an empty cell is NaN."""
    pd = pandas()
    numbers = pd.to_numeric(column, errors="coerce").astype("float64")
    wrong = (numbers.isna() & column.notna()).to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(
            f"{path}: column {column.name} is not numeric: {column.iloc[row]!r} in row {row + 1}"
        )
    return numbers.to_numpy()


def _stamps(column: Any, path: str) -> Stamps:
    """[T]: numbers as they are, anything else as dates; times of a zone in UTC."""
    pd = pandas()
    if pd.api.types.is_numeric_dtype(column):
        require(not column.isna().any(), f"{path}: column {column.name} has empty cells")
        return np.asarray(column.to_numpy())
    # One notation: guessing among 01/02/2024's two readings would shift a series in silence.
    dates = pd.to_datetime(column, errors="coerce", utc=True, format="ISO8601")
    if dates.isna().any():
        row = int(dates.isna().to_numpy().argmax())
        raise UserError(
            f"{path}: column {column.name} must hold numbers or ISO 8601 dates, got "
            f"{column.iloc[row]!r} in row {row + 1}"
        )
    return np.asarray(dates.dt.tz_localize(None).to_numpy(), dtype="datetime64[ns]")
