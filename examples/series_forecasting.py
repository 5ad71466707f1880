"""Forecasts of two hourly series: reading, gaps, training, backtest, intervals, sampled futures.

    python examples/series_forecasting.py            # about a minute
    python examples/series_forecasting.py --small    # seconds; learns little

The tutorial beside it: docs/tutorials/series.md.
"""

import argparse
import csv
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from seqkern.data.series import Normalizer, read_series, time_cuts
from seqkern.errors import UserError
from seqkern.forecasting import Linear, Naive, Network, backtest, backtest_ends, train_forecaster
from seqkern.models import ForecasterConfig, SeriesForecaster

HORIZON = 24


def write_table(path: Path, hours: int) -> None:
    """Hourly demand of two towns by day and week, with noise that fades; one hour is missing."""
    generator = torch.Generator().manual_seed(0)
    start = datetime(2024, 1, 1)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["town", "hour", "demand"])
        for town, level, first in (("Aberdeen", 40.0, 0), ("Bristol", 900.0, hours // 4)):
            disturbance = 0.0
            for h in range(first, hours):
                disturbance = 0.8 * disturbance + float(torch.randn((), generator=generator))
                day = torch.tensor(2 * torch.pi * h / 24).sin().item()
                weekend = 1.0 if h // 24 % 7 >= 5 else 0.0
                demand = level * (1 + 0.2 * day - 0.15 * weekend + 0.02 * disturbance)
                if h != first + 30:
                    writer.writerow([town, (start + timedelta(hours=h)).isoformat(), demand])


def main() -> None:
    """Read the table, train on its earlier part, test on the later one, forecast a day."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a run of seconds")
    small = parser.parse_args().small
    hours, context, hidden, steps = (400, 48, 8, 30) if small else (2400, 168, 64, 600)

    with TemporaryDirectory() as folder:
        path = Path(folder) / "demand.csv"
        write_table(path, hours)
        columns = {"time": "hour", "group": "town"}
        try:
            read_series(path, ["demand"], **columns)
        except UserError as error:
            print(f"a gap is an error unless asked to be filled: {str(error).split(': ', 1)[1]}")
        series = read_series(path, ["demand"], **columns, fill="linear")

    # One moment divides all series; all that is fitted sees what comes before it.
    values = [one.values for one in series]
    cuts = time_cuts(series, 0.2)
    training = [x[:cut] for x, cut in zip(values, cuts, strict=True)]
    normalizers = [Normalizer.fit(part) for part in training]
    normal = [n.apply(part) for n, part in zip(normalizers, training, strict=True)]

    torch.manual_seed(0)
    config = ForecasterConfig(horizon=HORIZON, context=context, hidden=hidden, head="quantile")
    model = SeriesForecaster(config)
    lengths = [len(part) for part in normal]
    stops = [int(0.85 * n) for n in lengths]
    validation = backtest_ends(stops, lengths, HORIZON, most=100)
    fit = train_forecaster(
        model, normal, validation=validation, cuts=stops, steps=steps, progress=False
    )
    print(f"{model.config.network}: kept step {fit.step} of {steps}, the best on held-out windows")

    network = Network(model, normalizers, HORIZON)
    network.calibrate(values, validation, level=0.9)
    methods = [
        network,
        Linear(training, normalizers, order=25, horizon=HORIZON),
        Naive(training, season=1, horizon=HORIZON),
        Naive(training, season=168 if not small else 24, horizon=HORIZON),
    ]
    ends = backtest_ends(cuts, [len(one) for one in series], HORIZON, most=100)
    print(f"\nbacktest on {len(ends)} held-back windows      MAE   coverage of 90% intervals")
    for score in backtest(methods, values, ends, HORIZON, 0.9, ["demand"]):
        print(f"{score.method:32s}{score.mae:10.2f}{score.coverage:10.2f}")

    now = [(s, len(one)) for s, one in enumerate(series)]
    forecast = network.forecast(values, now, level=0.9)
    for s, one in enumerate(series):
        print(f"\n{one.name}, the next hours:")
        for h, stamp in enumerate(one.interval.after(one.stamps[-1], 3)):
            low, mid, high = (
                float(x[s, h, 0]) for x in (forecast.lower, forecast.center, forecast.upper)
            )
            print(f"  {str(stamp)[:16]}  {mid:8.1f}  ({low:.1f} to {high:.1f})")

    # Step by step: whole futures, of which any question can be asked.
    z = normalizers[0].apply(values[0])
    futures = normalizers[0].invert(model.sample(z, HORIZON, paths=200).double())  # [200, 24, 1]
    peaks = futures.amax(dim=(1, 2))
    print(
        f"\n{series[0].name}'s peak of the next day: {peaks.median():.1f}, "
        f"above {peaks.quantile(0.9):.1f} with probability 0.1"
    )
    log_density = model.log_prob(z[None, -context:].float())
    print(f"log-density of its last {context} normalised hours: {log_density.item():.1f} nats")


if __name__ == "__main__":
    main()
