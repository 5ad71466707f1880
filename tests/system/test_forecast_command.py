import csv
import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file

from seqkern.errors import UserError
from seqkern.files import write_folder
from seqkern.forecasting.report import METRICS
from seqkern.forecasting.run import ForecastOptions, run_forecast
from seqkern.models import AutoregressiveModel, ForecasterConfig, SeriesForecaster

SMALL = ["--hidden", "8", "--steps", "30", "--context", "24", "--threads", "1", "--quiet"]


def write_table(path, T=120, start=0.0):
    """A yearly wave on a trend, monthly, with two columns."""
    rng = random.Random(0)
    lines = ["month,y,z"]
    for t in range(T):
        y = start + 0.1 * t + 5 * math.sin(t * math.pi / 6) + rng.gauss(0, 0.3)
        lines.append(f"{2000 + t // 12}-{t % 12 + 1:02d}-01,{y},{2 * y + rng.gauss(0, 1)}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def table(tmp_path):
    return write_table(tmp_path / "table.csv")


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "lstm"],
        ["--model", "gpt", "--head", "quantile", "--level", "0.8"],
        ["--model", "ar"],
        ["--model", "lstm", "--paths", "10"],
    ],
    ids=" ".join,
)
def test_a_forecast_leaves_all_its_files(cli_run, table, tmp_path, options):
    out = tmp_path / "out"
    code, text, _ = cli_run(
        *("forecast", table, "--column", "y", "--time", "month", "--horizon", 6),
        *(*SMALL, *options, "--out", out),
    )
    assert code == 0
    assert "season 12 (found)" in text
    files = ["config.json", "forecast.png", "forecasts.csv", "metrics.csv", "model.safetensors"]
    assert sorted(p.name for p in out.iterdir()) == files
    rows = read(out / "forecasts.csv")
    assert [row["time"] for row in rows] == [f"2010-{m:02d}-01" for m in range(1, 7)]
    assert [row["step"] for row in rows] == list("123456")
    assert all(float(r["lower"]) < float(r["forecast"]) < float(r["upper"]) for r in rows)
    metrics = read(out / "metrics.csv")
    name = {"lstm": "lstm", "gpt": "gpt", "ar": metrics[0]["method"]}[options[1]]
    baselines = ["last value", "seasonal (12)"]
    methods = [row["method"] for row in metrics]
    assert methods[:3] == [name, *baselines]
    assert all(method.startswith("AR(") for method in methods[3:])
    assert len(methods) == (3 if options[1] == "ar" else 4)
    assert tuple(metrics[0]) == METRICS
    assert all(float(row["mae"]) <= float(row["rmse"]) for row in metrics)
    assert all(f"{float(row['mae']):.5g}" in text for row in metrics)
    assert (out / "forecast.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_that_was_written_makes_the_forecast(cli_run, table, tmp_path):
    out = tmp_path / "out"
    arguments = ("forecast", table, "--column", "y", "--column", "z", "--horizon", 3, *SMALL)
    assert cli_run(*arguments, "--no-plot", "--out", out)[0] == 0
    described = json.loads((out / "config.json").read_text())
    model = SeriesForecaster(ForecasterConfig(**described["network"]))
    model.load_state_dict(load_file(out / "model.safetensors"))
    (normal,) = described["normalizers"]
    mean, std = torch.tensor(normal["mean"]), torch.tensor(normal["std"])
    values = torch.tensor([[float(row["y"]), float(row["z"])] for row in read(table)])
    center = model.forecast((values - mean) / std).center * std + mean  # [3, 2]
    written = {
        (r["column"], int(r["step"])): float(r["forecast"]) for r in read(out / "forecasts.csv")
    }
    for d, column in enumerate("yz"):
        for h in range(3):
            assert written[column, h + 1] == pytest.approx(float(center[h, d]), rel=1e-4)


def test_the_linear_model_that_was_written_makes_the_forecast(cli_run, table, tmp_path):
    out = tmp_path / "out"
    arguments = ("forecast", table, "--column", "y", "--horizon", 3, "--model", "ar", "--order", 2)
    assert cli_run(*arguments, "--no-plot", "--out", out)[0] == 0
    model = AutoregressiveModel(2)
    model.load_state_dict(load_file(out / "model.safetensors"))
    (normal,) = json.loads((out / "config.json").read_text())["normalizers"]
    values = torch.tensor([float(row["y"]) for row in read(table)], dtype=torch.float64)
    forecast = model.forecast((values - normal["mean"][0]) / normal["std"][0], 3)
    written = [float(row["upper"]) for row in read(out / "forecasts.csv")]
    expected = forecast.upper * normal["std"][0] + normal["mean"][0]
    assert written == pytest.approx(expected.tolist())


@pytest.mark.parametrize("model", ["lstm", "ar"])
def test_nothing_that_is_fitted_sees_what_is_held_back(tmp_path, model):
    """Other values in the last fifth: the same parameters, other scores."""
    results = []
    for name in ("same", "other"):
        path = write_table(tmp_path / f"{name}.csv")
        if name == "other":
            lines = path.read_text().splitlines()
            lines[97:] = [
                line.split(",")[0] + f",{7 ** (t % 5)},0" for t, line in enumerate(lines[97:])
            ]
            path.write_text("\n".join(lines))
        options = ForecastOptions(
            str(path), ("y",), 6, time="month", model=model, hidden=8, steps=20
        )
        results.append(run_forecast(options, progress=False))
    a, b = results
    assert a.cuts == b.cuts == [96]
    assert (a.season, a.order, a.fit) == (b.season, b.order, b.fit)
    assert all(torch.equal(x, b.model.state_dict()[k]) for k, x in a.model.state_dict().items())
    assert torch.equal(a.normalizers[0].mean, b.normalizers[0].mean)
    if model == "lstm":
        assert torch.equal(a.method.widening, b.method.widening)
        assert a.method.widening != 1
    assert a.scores[0].mae != b.scores[0].mae


def test_the_same_seed_forecasts_the_same(cli_run, table, tmp_path):
    def forecasts(name, seed):
        out = tmp_path / name
        arguments = ("forecast", table, "--column", "y", "--horizon", 3, *SMALL, "--no-plot")
        assert cli_run(*arguments, "--seed", seed, "--out", out)[0] == 0
        return (out / "forecasts.csv").read_text()

    assert forecasts("a", 1) == forecasts("b", 1)
    assert forecasts("a2", 1) != forecasts("c", 2)


def test_several_series_of_different_lengths_and_levels(cli_run, tmp_path):
    lines = ["shop,day,sales"]
    for shop, level, first, last in (("north", 10, 1, 80), ("south", 5000, 21, 80)):
        for day in range(first, last + 1):
            lines.append(f"{shop},{day},{level * (2 + math.sin(day * 2 * math.pi / 7))}")
    path = tmp_path / "sales.csv"
    path.write_text("\n".join(lines))
    out = tmp_path / "out"
    code, text, _ = cli_run(
        *("forecast", path, "--column", "sales", "--time", "day", "--group", "shop"),
        *("--horizon", 5, *SMALL, "--out", out),
    )
    assert code == 0
    assert "140 steps of 1 in 2 series" in text
    rows = read(out / "forecasts.csv")
    assert [(r["series"], r["time"]) for r in rows] == [
        (shop, str(day)) for shop in ("north", "south") for day in range(81, 86)
    ]
    levels = {"north": 10, "south": 5000}  # the values are from 1 to 3 times these
    assert all(0.8 < float(r["forecast"]) / levels[r["series"]] < 3.2 for r in rows)


def test_gaps_are_filled_on_request(cli_run, table, tmp_path):
    lines = table.read_text().splitlines()
    del lines[30]
    lines[50] = lines[50].split(",")[0] + ",,"
    table.write_text("\n".join(lines))
    arguments = ["forecast", table, "--column", "y", "--time", "month", "--horizon", 6]
    out = tmp_path / "out"
    code, _, err = cli_run(*arguments, *SMALL, "--out", out)
    assert (code, err.count("\n")) == (2, 1)
    assert "1 of 120 steps are missing at an interval of 1 month, the first is 2002-06-01" in err
    code, text, _ = cli_run(*arguments, *SMALL, "--fill", "linear", "--out", out)
    assert code == 0
    assert "2 filled (linear)" in text


def sabotage(table, kind):
    lines = table.read_text().splitlines()
    values = [line.split(",") for line in lines[1:]]
    if kind == "empty":
        lines = []
    elif kind == "header":
        lines = lines[:1]
    elif kind == "constant":
        lines[1:] = [f"{month},3,{z}" for month, _, z in values]
    elif kind == "nan":
        lines[9] = f"{values[8][0]},nan,1"
    elif kind == "text":
        lines[9] = f"{values[8][0]},many,1"
    elif kind == "irregular":
        lines[9] = lines[9].replace("-01,", "-11,", 1)
    elif kind == "order":
        lines[9], lines[10] = lines[10], lines[9]
    elif kind == "short":
        lines = lines[:9]
    table.write_text("\n".join(lines) + ("\n" if lines else ""))


@pytest.mark.parametrize(
    ("kind", "options", "fragment"),
    [
        ("empty", [], "table.csv is empty"),
        ("header", [], "table.csv has no rows"),
        ("constant", [], "column y is constant (3) in the training part"),
        ("nan", [], "1 values are missing, the first is y at 2000-09-01"),
        ("text", [], "column y is not numeric: 'many' in row 9"),
        ("irregular", [], "2000-09-11 (row 9) is between two steps; 1 of 120 stamps are"),
        ("order", [], "stamps must increase, got 2000-09-01 (row 10) after 2000-10-01"),
        ("short", [], "horizon is 6, but at most 1 steps of a series are held back"),
        ("", ["--column", "x"], "table.csv has no column 'x': it has month, y, z"),
        ("", ["--column", "y", "--column", "y"], "columns must be different, got y more than once"),
        ("", ["--column", "month"], "column month is not numeric: '2000-01-01' in row 1"),
        ("", ["--time", "day"], "table.csv has no column 'day'"),
        ("", ["--horizon", "500"], "horizon must be shorter than the series, whose length is 120"),
        ("", ["--horizon", "30"], "horizon is 30, but at most 24 steps of a series are held back"),
        ("", ["--horizon", "0"], "horizon must be at least 1, got 0"),
        ("", ["--level", "1"], "level must be in (0, 1), got 1.0"),
        ("", ["--test-fraction", "0"], "test_fraction must be in (0, 1), got 0.0"),
        ("", ["--model", "gpt", "--hidden", "10"], "multiple of heads = 4, got 10"),
        ("", ["--model", "mlp"], "invalid choice: 'mlp'"),
        ("", ["--order", "0"], "order must be at least 1, got 0"),
        ("", ["--order", "97", "--model", "ar"], "order must be at most the 96 steps"),
        ("", ["--season", "-1"], "season must be at least 1, got -1"),
        ("", ["--season", "96"], "season must be shorter than the training part of 96 steps"),
        ("", ["--paths", "-1"], "paths must be at least 0, got -1"),
        ("", ["--steps", "0"], "steps must be at least 1, got 0"),
        ("", ["--seed", "-1"], "seed must be in"),
        ("", ["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N"),
        ("", ["--lr", "1e30"], "training diverged, try a lower lr"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_bad_input_is_one_line_and_leaves_nothing(
    cli_run, table, tmp_path, kind, options, fragment
):
    sabotage(table, kind)
    out = tmp_path / "out"
    columns = [] if "--column" in options else ["--column", "y"]
    arguments = ["forecast", table, *columns, "--time", "month", "--horizon", 6, *SMALL]
    code, text, err = cli_run(*arguments, *options, "--out", out)
    assert (code, text) == (2, "")
    assert err.startswith("seqkern: error: ")
    assert err.count("\n") == 1
    assert fragment in err
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_a_folder_that_holds_something_is_left_alone(cli_run, table, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    arguments = ("forecast", table, "--column", "y", "--horizon", 3, *SMALL)
    code, _, err = cli_run(*arguments, "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "already holds files (notes.txt)" in err
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    code, _, err = cli_run(*arguments, "--out", table)
    assert code == 2
    assert "is not a folder" in err


def test_a_folder_is_whole_or_not_there(tmp_path):
    def stop(folder):
        (folder / "part").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", stop)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/out"):
        write_folder(tmp_path / "file" / "out", stop)


def test_without_matplotlib_everything_else_is_there(cli_run, table, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    out = tmp_path / "out"
    arguments = ("forecast", table, "--column", "y", "--horizon", 3, "--model", "ar")
    code, text, _ = cli_run(*arguments, "--out", out)
    assert code == 0
    assert "forecast.png was not drawn: " in text
    assert not (out / "forecast.png").exists()
    assert (out / "forecasts.csv").exists()
