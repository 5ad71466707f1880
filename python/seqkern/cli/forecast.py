"""`seqkern forecast`."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from seqkern.cli.running import set_threads
from seqkern.data.series.table import FILLS
from seqkern.errors import UserError
from seqkern.files import require_new_folder, write_folder
from seqkern.forecasting.picture import draw_forecast
from seqkern.forecasting.report import metrics_table, write_result
from seqkern.forecasting.run import MODELS, ForecastOptions, ForecastResult, run_forecast
from seqkern.models.forecaster import HEADS

_DEFAULTS = {field.name: field.default for field in fields(ForecastOptions)}


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "forecast",
        help="forecast the columns of a table",
        description="Train on the earlier part of the series in a CSV or Parquet file, backtest "
        "on the later part beside simple methods, and forecast what comes next. Leaves a folder "
        "with forecasts.csv, metrics.csv, forecast.png, config.json and model.safetensors.",
    )
    parser.set_defaults(command=_forecast)

    def option(group: Any, flag: str, text: str, **options: Any) -> None:
        default = _DEFAULTS[flag.removeprefix("--").replace("-", "_")]
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(flag, default=default, help=text + shown, **options)

    data = parser.add_argument_group("data")
    data.add_argument("file", metavar="FILE", help="CSV, or Parquet by its ending")
    data.add_argument(
        "--column",
        action="append",
        required=True,
        dest="columns",
        metavar="NAME",
        help="numeric column to forecast; again for each further one, forecast together",
    )
    option(data, "--time", "column of ISO 8601 dates or numbers (default: rows are steps)")
    option(data, "--group", "column that names each row's series (default: one series)")
    option(data, "--fill", "how to fill missing steps and values (default: refuse)", choices=FILLS)
    data.add_argument("--horizon", type=int, required=True, help="steps to forecast")
    option(data, "--level", "probability of the intervals", type=float)
    option(data, "--test-fraction", "of all steps, the latest, held back to test", type=float)

    model = parser.add_argument_group("model")
    option(model, "--model", "lstm, causal transformer, or linear autoregression", choices=MODELS)
    option(model, "--head", "normal distribution or quantiles", choices=HEADS)
    option(model, "--order", "of the autoregression (default: by AIC)", type=int)
    option(model, "--season", "steps of a season (default: looked for)", type=int)
    option(
        model, "--context", "most steps read (default: two seasons or horizons, 32 up)", type=int
    )
    option(model, "--hidden", "width of the network", type=int)
    option(model, "--layers", "its layers", type=int)
    option(model, "--dropout", "dropout probability", type=float)
    option(
        model,
        "--paths",
        "futures sampled step by step for each forecast; 0: all steps at once",
        type=int,
    )

    training = parser.add_argument_group("training")
    option(training, "--steps", "updates", type=int)
    option(training, "--batch-size", "windows per update", type=int)
    option(training, "--lr", "peak learning rate", type=float)
    option(training, "--seed", "of parameters, windows and futures", type=int)
    option(training, "--device", "auto, cpu, cuda or cuda:N")

    running = parser.add_argument_group("running")
    running.add_argument("--out", type=Path, required=True, help="new folder for the results")
    running.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    running.add_argument(
        "--plot", action=argparse.BooleanOptionalAction, default=True, help="draw forecast.png"
    )
    running.add_argument("--quiet", action="store_true", help="no progress bar")


def _forecast(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    given = {name: value for name, value in vars(args).items() if name in _DEFAULTS}
    options = ForecastOptions(**{**given, "columns": tuple(args.columns)})
    require_new_folder(args.out)
    result = run_forecast(options, progress=not args.quiet)
    missing: list[str] = []

    def write(folder: Path) -> None:
        write_result(result, folder)
        if args.plot:
            try:
                draw_forecast(result, folder / "forecast.png")
            except UserError as error:  # the forecast is worth more than its picture
                missing.append(f"forecast.png was not drawn: {error}")

    write_folder(args.out, write)
    print(_summary(result))
    print(metrics_table(result))
    print(*missing, f"see {args.out}: forecasts.csv, metrics.csv", sep="\n", end="")
    print("" if missing or not args.plot else ", forecast.png")
    return 0


def _summary(result: ForecastResult) -> str:
    o, fit = result.options, result.fit
    steps = sum(len(series) for series in result.series)
    several = f" in {len(result.series)} series" if len(result.series) > 1 else ""
    filled = sum(series.filled for series in result.series)
    lines = [
        f"{o.file}: {steps:,} steps of {result.series[0].interval.text}{several}, "
        f"{sum(result.cuts):,} of them for training"
        + (f", {filled:,} filled ({o.fill})" if filled else ""),
        f"season {result.season if result.season > 1 else 'none'}"
        f"{'' if o.season else ' (found)'}, order {result.order}{'' if o.order else ' (by AIC)'}",
    ]
    if fit is not None:
        kept = f"step {fit.step} of {o.steps}"
        how = "the last" if fit.validation_loss is None else "the best on held-out windows"
        lines.append(f"{o.model}: the parameters are those of {kept}, {how}")
    windows = result.scores[0].windows
    lines.append(
        f"backtest: {windows:,} held-back windows, {o.horizon} steps each, level {o.level}"
    )
    return "\n".join(lines)
