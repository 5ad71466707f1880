"""The interval between the stamps of a series: found, checked, and continued."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from seqkern.errors import missing_extra, require

Stamps = np.ndarray[Any, Any]  # [T], datetime64[ns], int64 or float64

# More missing steps than this for each one that is there: the stamps are wrong, not incomplete.
_MOST_MISSING = 20


def pandas() -> Any:
    """The pandas module; `UserError` where it is not installed."""
    try:
        import pandas  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise missing_extra("pandas", "series", "reading series and their dates") from error
    return pandas


@dataclass(frozen=True)
class Interval:
    """A constant step between stamps: a number, a time, or a calendar step such as a month."""

    step: Any  # float for numbers, else a pandas offset
    text: str  # as messages show it

    def stamps(self, first: Any, count: int) -> Stamps:
        """[count]: `first` and those that follow it."""
        if isinstance(self.step, float):
            stamps: Stamps = first + self.step * np.arange(count)
            whole = np.issubdtype(np.asarray(first).dtype, np.integer) and self.step.is_integer()
            return stamps.astype(np.int64) if whole else stamps
        index = pandas().date_range(first, periods=count, freq=self.step)
        return np.asarray(index.to_numpy(), dtype="datetime64[ns]")

    def after(self, last: Any, count: int) -> Stamps:
        """[count]: the stamps that follow `last`."""
        return self.stamps(last, count + 1)[1:]


def stamp_text(stamp: Any) -> str:
    """A stamp as messages and files show it: no time of day where it is midnight."""
    if not isinstance(stamp, np.datetime64):
        return f"{stamp:.12g}"
    text = str(stamp.astype("datetime64[s]")).replace("T", " ")
    return text.removesuffix(" 00:00:00")


def find_interval(stamps: Stamps, what: str = "stamps") -> Interval:
    """The constant step that explains the stamps best: the most of them, with the fewest gaps.

    Candidates are the most common difference and, for dates, steps of whole months (from the same
    day or the month's end) and business days.

    Args:
        stamps: [T], T >= 2, datetime64, integers or floats.
        what: what messages call the stamps.

    Raises:
        UserError: a stamp that is missing, not after the one before, or too far from it.
    """
    require(len(stamps) >= 2, f"{what}: an interval needs two stamps, got {len(stamps)}")
    dates = stamps.dtype.kind == "M"
    missing = np.isnat(stamps) if dates else ~np.isfinite(stamps)
    if missing.any():
        require(False, f"{what}: no stamp in row {int(missing.argmax()) + 1}")
    differences = np.diff(stamps)
    wrong = differences <= np.zeros((), differences.dtype)
    if wrong.any():
        row = int(wrong.argmax()) + 1
        require(
            False,
            f"{what}: stamps must increase, got {stamp_text(stamps[row])} (row {row + 1}) after "
            f"{stamp_text(stamps[row - 1])}",
        )
    values, counts = np.unique(differences, return_counts=True)
    common = values[counts.argmax()]
    steps = float((stamps[-1] - stamps[0]) / common)
    require(
        steps <= (_MOST_MISSING + 1) * len(stamps),
        f"{what}: {len(stamps)} stamps from {stamp_text(stamps[0])} to {stamp_text(stamps[-1])} "
        f"cannot have the interval {_text(common)} of most of them",
    )
    if not dates:
        return Interval(float(common), f"{float(common):g}")
    candidates = _date_candidates(stamps[0], common)
    return max(candidates, key=lambda interval: _agreement(interval, stamps))


def places(stamps: Stamps, interval: Interval) -> tuple[Stamps, np.ndarray[Any, Any]]:
    """All stamps [S] that the interval asks for, and where each of `stamps` [T] stands in them.

    The place is -1 for a stamp that is between two steps.
    """
    if isinstance(interval.step, float):
        exact = (stamps - stamps[0]) / interval.step
        nearest = np.rint(exact).astype(np.int64)
        apart = np.abs(exact - nearest) > 1e-6 * np.maximum(1.0, np.abs(exact))
        return interval.stamps(stamps[0], int(nearest[-1]) + 1), np.where(apart, -1, nearest)
    expected = pandas().date_range(stamps[0], stamps[-1], freq=interval.step)
    expected = np.asarray(expected.to_numpy(), dtype="datetime64[ns]")
    nearest = np.searchsorted(expected, stamps).clip(max=max(len(expected) - 1, 0))
    known = expected[nearest] == stamps if len(expected) else np.zeros(len(stamps), bool)
    return expected, np.where(known, nearest, -1)


def _agreement(interval: Interval, stamps: Stamps) -> float:
    """Stamps that are explained, over all that are there or asked for."""
    expected, place = places(stamps, interval)
    explained = int((place >= 0).sum())
    return explained / (len(expected) + len(stamps) - explained)


def _date_candidates(first: Any, common: Any) -> list[Interval]:
    pd = pandas()
    delta = pd.Timedelta(common)
    found = [Interval(delta, _text(common))]
    if delta == pd.Timedelta(days=1):
        found.append(Interval(pd.offsets.BDay(), "1 business day"))
    months = round(delta.days / 30.4369)
    if months >= 1:
        unit = "1 month" if months == 1 else f"{months} months"
        found.append(Interval(pd.DateOffset(months=months), unit))
        found.append(Interval(pd.offsets.MonthEnd(months), unit))
    return found


def _text(difference: Any) -> str:
    if not isinstance(difference, np.timedelta64):
        return f"{float(difference):g}"
    delta = pandas().Timedelta(difference)
    for unit in ("days", "hours", "minutes", "seconds"):
        count = delta / pandas().Timedelta(1, unit=unit)
        if count >= 1 and count == int(count):
            return f"{int(count)} {unit if count != 1 else unit[:-1]}"
    return str(delta)
