"""Series of tables and arrays: intervals, gaps, bad input."""

import numpy as np
import pandas as pd
import pytest
import torch

from seqkern.data.series import make_series, read_series
from seqkern.errors import UserError


def dates(first, periods, freq):
    return pd.date_range(first, periods=periods, freq=freq).to_numpy()


def column(series, d=0):
    return series.values[:, d].tolist()


REGULAR = {
    "10 seconds": dates("2024-01-31 23:59:50", 20, "10s"),
    "15 minutes": dates("2024-01-01", 20, "15min"),
    "1 hour": dates("2024-01-01", 20, "h"),
    "1 day": dates("2023-12-20", 20, "D"),
    "7 days": dates("2024-01-03", 20, "7D"),
    "1 business day": dates("2024-01-01", 30, "B"),
    "1 month": dates("2024-01-15", 20, pd.DateOffset(months=1)),
    "month ends": dates("2024-01-31", 20, "ME"),
    "3 months": dates("2024-01-01", 20, "QS"),
    "12 months": dates("2000-01-01", 20, "YS"),
    "1": np.arange(1700, 1720),
    "0.1": np.arange(20) * 0.1,
}


@pytest.mark.parametrize("name", REGULAR)
def test_interval_is_found_and_continued(name):
    stamps = REGULAR[name]
    known, future = stamps[:-4], stamps[-4:]
    series = make_series(np.arange(len(known)), known)
    assert series.interval.text == {"month ends": "1 month"}.get(name, name)
    continued = series.interval.after(series.stamps[-1], 4)
    assert continued.dtype == series.stamps.dtype  # dates: nanoseconds, whatever pandas has
    if stamps.dtype.kind == "f":
        np.testing.assert_allclose(continued, future)
    else:
        assert (continued == future).all()


@pytest.mark.parametrize("name", REGULAR)
def test_gaps_are_reported_and_filled_on_request(name):
    stamps, values = REGULAR[name], np.arange(len(REGULAR[name])) * 2.0
    kept = np.delete(np.arange(len(stamps)), [7, 8, 11])
    with pytest.raises(UserError, match=r"3 of \d+ steps are missing at an interval of"):
        make_series(values[kept], stamps[kept])
    linear = make_series(values[kept], stamps[kept], fill="linear")
    np.testing.assert_allclose(column(linear), values)
    assert linear.filled == 3
    assert len(linear.stamps) == len(stamps)
    last = make_series(values[kept], stamps[kept], fill="last")
    assert column(last)[6:13] == [12, 12, 12, 18, 20, 20, 24]


def test_the_first_gap_is_named():
    stamps = np.delete(REGULAR["1 hour"], [7, 8, 11])
    message = "3 of 20 steps are missing at an interval of 1 hour, the first is 2024-01-01 07:00:00"
    with pytest.raises(UserError, match=message):
        make_series(np.ones(17), stamps)


def test_missing_values_are_gaps_too():
    values = np.array([[1.0, 5], [np.nan, 6], [3, 7], [4, np.nan], [np.nan, np.nan], [6, 10]])
    with pytest.raises(UserError, match="4 values are missing, the first is a at 2001-01-02"):
        make_series(values, dates("2001-01-01", 6, "D"), columns="ab")
    linear = make_series(values, fill="linear")
    assert column(linear) == [1, 2, 3, 4, 5, 6]
    assert column(linear, 1) == [5, 6, 7, 8, 9, 10]
    assert linear.filled == 3
    last = make_series(values, fill="last")
    assert column(last) == [1, 1, 3, 4, 4, 6]
    assert np.isnan(values).sum() == 4  # the caller's array is left alone


@pytest.mark.parametrize(("fill", "end"), [("linear", 0), ("linear", 4), ("last", 0)])
def test_ends_are_not_invented(fill, end):
    values = np.arange(5.0)
    values[end] = np.nan
    with pytest.raises(UserError, match=f"0 is missing at {end}, an end of the series"):
        make_series(values, fill=fill)


def test_last_carries_on_to_the_end():
    assert column(make_series([1.0, 2.0, np.nan], fill="last")) == [1, 2, 2]


def test_irregular_stamps_are_refused_even_with_fill():
    stamps = REGULAR["1 hour"].copy()
    stamps[5] += np.timedelta64(10, "m")
    with pytest.raises(
        UserError, match=r"2024-01-01 05:10:00 \(row 6\) is between two steps; 1 of"
    ):
        make_series(np.ones(20), stamps, fill="linear")
    with pytest.raises(UserError, match=r"interval is 1, but 3.5 \(row 4\) is between"):
        make_series(np.ones(6), np.array([0, 1, 2, 3.5, 4, 5]), fill="linear")


@pytest.mark.parametrize(
    ("values", "stamps", "named"),
    [
        ([1, 2, 3], [1, 3, 2], r"stamps must increase, got 2 \(row 3\) after 3"),
        ([1, 2, 3], [1, 2, 2], r"stamps must increase, got 2 \(row 3\) after 2"),
        ([1, 2, 3], [1, 2, np.nan], "no stamp in row 3"),
        ([1, 2, 3], [1, 2], r"stamps must be 3 dates or numbers, got int64 \[2\]"),
        ([1, 2, 3], ["a", "b", "c"], "stamps must be 3 dates or numbers, got <U1"),
        ([1, 2, 3, 4], [0, 1, 2, 10**9], "cannot have the interval 1 of most of them"),
        ([1, np.inf], None, "0 is infinite at 1"),
        ([1.0], None, "at least 2 steps are needed, got 1"),
        (np.ones((2, 3, 4)), None, r"values must be \[T\] or \[T, D\]"),
    ],
)
def test_wrong_arrays_are_refused(values, stamps, named):
    with pytest.raises(UserError, match=named):
        make_series(values, stamps)
    with pytest.raises(UserError, match=named):
        make_series(values, stamps, fill="linear")


def test_wrong_names_and_fills_are_refused():
    with pytest.raises(UserError, match="fill must be None or one of linear, last, got zero"):
        make_series([1, 2], fill="zero")
    with pytest.raises(UserError, match="1 columns have 2 names"):
        make_series([1, 2], columns=["a", "b"])


@pytest.fixture(params=["csv", "parquet"])
def save(request, tmp_path):
    def write(table):
        path = tmp_path / f"table.{request.param}"
        if request.param == "csv":
            table.to_csv(path, index=False)
        else:
            table.to_parquet(path)
        return path

    return write


def test_a_table_of_one_series(save):
    table = pd.DataFrame({"day": dates("2024-02-27", 4, "D"), "y": [1, 2, 3, 4], "z": 0.5})
    (series,) = read_series(save(table), ["z", "y"], time="day")
    assert (series.name, series.columns) == ("", ("z", "y"))
    assert series.values.tolist() == [[0.5, 1], [0.5, 2], [0.5, 3], [0.5, 4]]
    assert series.values.dtype == torch.float64
    assert (series.stamps == table["day"].to_numpy()).all()


def test_a_table_of_several_series_of_different_lengths(save):
    table = pd.DataFrame(
        {
            "id": ["b", "a", "b", "a", "b"],
            "t": [10, 1, 20, 2, 40],
            "y": [1.0, 5.0, 2.0, 6.0, 4.0],
        }
    )
    b, a = read_series(save(table), ["y"], time="t", group="id", fill="linear")
    assert (b.name, column(b), b.stamps.tolist(), b.filled) == (
        "b",
        [1, 2, 3, 4],
        [10, 20, 30, 40],
        1,
    )
    assert (a.name, column(a), a.stamps.tolist()) == ("a", [5, 6], [1, 2])
    with pytest.raises(UserError, match=r"series b: 1 of 4 steps are missing .* the first is 30"):
        read_series(save(table), ["y"], time="t", group="id")


def test_the_index_of_a_parquet_file_is_a_column(tmp_path):
    index = pd.DatetimeIndex(dates("2024-01-01", 3, "D"), name="day")
    pd.DataFrame({"y": [1.0, 2, 3]}, index=index).to_parquet(tmp_path / "table.parquet")
    (series,) = read_series(tmp_path / "table.parquet", ["y"], time="day")
    assert series.interval.text == "1 day"


def test_without_a_time_column_rows_are_steps(save):
    (series,) = read_series(save(pd.DataFrame({"y": [3.0, 1.0, 2.0]})), ["y"])
    assert series.stamps.tolist() == [0, 1, 2]
    assert series.interval.after(series.stamps[-1], 2).tolist() == [3, 4]


def test_times_of_a_zone_are_utc(tmp_path):
    path = tmp_path / "zone.csv"
    path.write_text("t,y\n2024-01-01T00:00+02:00,1\n2024-01-01T01:00+02:00,2\n")
    (series,) = read_series(path, ["y"], time="t")
    assert series.stamps[0] == np.datetime64("2023-12-31T22:00")


@pytest.mark.parametrize(
    ("content", "options", "named"),
    [
        ("", {}, "table.csv is empty"),
        ("t,y\n", {}, "table.csv has no rows"),
        ("t,x\n1,2\n", {}, "table.csv has no column 'y': it has t, x"),
        ("t,y\n1,2\n2,two\n", {}, "column y is not numeric: 'two' in row 2"),
        ("t,y\n1,2\n2,\n3,4\n", {}, "1 values are missing, the first is y at 1"),
        ("t,y\nx1,2\n2024-01-01,3\n", {"time": "t"}, "ISO 8601 dates, got 'x1' in row 1"),
        ("t,y\n2024-01-01,2\n01/02/2024,3\n", {"time": "t"}, "dates, got '01/02/2024' in row 2"),
        ("t,y\n1,2\n,3\n", {"time": "t"}, "column t has empty cells"),
        ("t,y\n1,2\n2,3\n", {"time": "day"}, "no column 'day'"),
        ("t,y\n1,2\n2,3\n", {"group": "id"}, "no column 'id'"),
        ("t,y\n,2\n2,3\n", {"group": "t"}, "column t has rows without a name"),
        ("t,y\n1,2\n2,3,4,5,6\n", {}, "table.csv is not a CSV file"),
        ("t,y\n1,2\n", {}, "at least 2 steps are needed, got 1"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, content, options, named):
    path = tmp_path / "table.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=named):
        read_series(path, ["y"], **options)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*no.csv: No such file"):
        read_series(tmp_path / "no.csv", ["y"])
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        read_series(tmp_path, ["y"])
    (tmp_path / "bad.csv").write_bytes(b"\xff\xfe\x00y\n\x80\x81\n")
    with pytest.raises(UserError, match=r"bad.csv is not a CSV file"):
        read_series(tmp_path / "bad.csv", ["y"])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and not much else")
    with pytest.raises(UserError, match=r"bad.parquet is not a Parquet file"):
        read_series(tmp_path / "bad.parquet", ["y"])


def test_without_pandas_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    (tmp_path / "t.csv").write_text("y\n1\n2\n")
    with pytest.raises(
        UserError, match=r"needs the package pandas: pip install 'seqkern\[series\]'"
    ):
        read_series(tmp_path / "t.csv", ["y"])


def test_importing_seqkern_does_not_import_pandas():
    import subprocess
    import sys

    code = "import sys, seqkern, seqkern.data.series; sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
