"""`seqkern forecast`: a file's series read, a model fitted, backtested, and its forecasts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqkern.config import resolve_device
from seqkern.data.series import Normalizer, Series, read_series, time_cuts
from seqkern.errors import require
from seqkern.forecasting.backtest import Score, backtest, backtest_ends
from seqkern.forecasting.methods import (
    Linear,
    Method,
    Naive,
    Network,
    find_season,
    select_order,
)
from seqkern.forecasting.training import Fit, train_forecaster
from seqkern.models import Forecast, ForecasterConfig, SeriesForecaster
from seqkern.models.forecast import check_horizon, normal_score

MODELS = ("lstm", "gpt", "ar")
_VALIDATION_FRACTION = 0.15  # of the training part


@dataclass(frozen=True)
class ForecastOptions:
    """Every option of a forecast; field names are the command line's options."""

    file: str
    columns: tuple[str, ...]
    horizon: int
    time: str | None = None
    group: str | None = None
    fill: str | None = None
    model: str = "lstm"
    head: str = "gaussian"
    order: int | None = None  # of the autoregressive model; None: by AIC
    season: int | None = None  # None: found in the training part
    context: int | None = None  # None: two seasons or horizons
    hidden: int = 64
    layers: int = 1
    dropout: float = 0.0
    steps: int = 600
    batch_size: int = 32
    lr: float = 3e-3
    level: float = 0.95
    paths: int = 0
    test_fraction: float = 0.2
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check what needs no data; models check their sizes themselves."""
        check_horizon(self.horizon)
        normal_score(self.level)
        require(
            self.model in MODELS, f"model must be one of {', '.join(MODELS)}, got {self.model!r}"
        )
        require(
            0 < self.test_fraction < 1,
            f"test_fraction must be in (0, 1), got {self.test_fraction}",
        )
        require(self.paths >= 0, f"paths must be at least 0, got {self.paths}")
        for name in ("order", "season", "context"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        require(0 <= self.seed < 2**63, f"seed must be in [0, 2**63), got {self.seed}")
        resolve_device(self.device)


@dataclass(frozen=True)
class ForecastResult:
    """What a forecast found, ready to be written."""

    options: ForecastOptions
    series: list[Series]
    cuts: list[int]  # per series the steps of its training part
    season: int
    order: int
    method: Method  # the model asked for
    model: nn.Module
    fit: Fit | None  # of a network
    normalizers: list[Normalizer]
    scores: list[Score]  # of the model first, then of the baselines
    forecast: Forecast  # [series, horizon, D], of the steps after the last


def run_forecast(options: ForecastOptions, progress: bool = True) -> ForecastResult:
    """Read, train on the earlier part, backtest on the later one, forecast what comes after.

    Everything that is fitted or chosen (normalisation, season, order, parameters and the step at
    which they are kept) sees the training part alone. The model that is backtested is the one
    that forecasts; it reads all values there are.

    Raises:
        UserError: wrong options or data; nothing has been written.
    """
    o = options
    series = read_series(o.file, o.columns, time=o.time, group=o.group, fill=o.fill)
    values = [one.values for one in series]
    cuts = time_cuts(series, o.test_fraction)
    longest = max(len(one) for one in series)
    require(
        o.horizon < longest,
        f"{o.file}: horizon must be shorter than the series, whose length is {longest}, "
        f"got {o.horizon}",
    )
    ends = backtest_ends(cuts, [len(one) for one in series], o.horizon)
    for one, cut in zip(series, cuts, strict=True):
        named = f"series {one.name}" if one.name else "the series"
        require(
            cut >= 3,
            f"{o.file}: {named} has {cut} steps in the training part, at least 3 are needed",
        )
    training = [x[:cut] for x, cut in zip(values, cuts, strict=True)]
    normalizers = [Normalizer.fit(part, o.columns) for part in training]
    normal = [n.apply(part) for n, part in zip(normalizers, training, strict=True)]
    season = o.season or find_season(max(normal, key=len)[:, 0])
    shortest = min(cuts)
    order = o.order or select_order(normal, max(1, min(shortest // 4, max(12, season + 1), 60)))
    linear = Linear(training, normalizers, order, o.horizon)
    baselines: list[Method] = [Naive(training, 1, o.horizon)]
    if season > 1:
        baselines.append(Naive(training, season, o.horizon))
    fit: Fit | None = None
    method: Method = linear
    model: nn.Module = linear.model
    if o.model != "ar":
        baselines.append(linear)
        network, fit, validation = _network(o, normal, season, progress)
        model, method = network, Network(network, normalizers, o.horizon, o.paths, o.seed)
        if validation:
            method.calibrate(values, validation, o.level)
    scores = backtest([method, *baselines], values, ends, o.horizon, o.level, o.columns)
    future = method.forecast(values, [(s, len(x)) for s, x in enumerate(values)], o.level)
    return ForecastResult(
        o, series, cuts, season, order, method, model, fit, normalizers, scores, future
    )


def _network(
    o: ForecastOptions, normal: Sequence[Tensor], season: int, progress: bool
) -> tuple[SeriesForecaster, Fit, list[tuple[int, int]]]:
    """A trained network, and the windows at the end of the training part that it was not fitted on.

    They choose the step that is kept.
    """
    lengths = [len(x) for x in normal]
    room = max(1, max(lengths) - o.horizon)
    context = min(o.context or max(2 * season, 2 * o.horizon, 32), room)
    torch.manual_seed(o.seed)
    config = ForecasterConfig(
        columns=len(o.columns),
        horizon=o.horizon,
        network=o.model,
        head=o.head,
        context=context,
        hidden=o.hidden,
        layers=o.layers,
        dropout=o.dropout,
    )
    model = SeriesForecaster(config).to(resolve_device(o.device))
    # Long enough for a window; too short a series is trained on whole.
    stops = [n - max(int(n * _VALIDATION_FRACTION), o.horizon) for n in lengths]
    validation: list[tuple[int, int]] = []
    if max(stops) > 2 * o.horizon:
        validation = backtest_ends([max(s, 1) for s in stops], lengths, o.horizon, 256)
    fit = train_forecaster(
        model,
        normal,
        validation=validation,
        cuts=[max(s, 0) for s in stops] if validation else None,
        steps=o.steps,
        batch_size=o.batch_size,
        lr=o.lr,
        seed=o.seed,
        progress=progress,
    )
    return model, fit, validation
