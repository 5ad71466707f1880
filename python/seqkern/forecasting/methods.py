"""Ways to forecast, each fitted on the training parts of one or many series."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from seqkern.data.series import Normalizer, gather_windows
from seqkern.errors import require
from seqkern.models import AutoregressiveModel, Forecast, SeriesForecaster
from seqkern.models.forecast import normal_score

Ends = Sequence[tuple[int, int]]  # (s, t): what is known are the first t steps of series s


class Method(Protocol):
    """A fitted way to forecast."""

    name: str

    def forecast(self, values: Sequence[Tensor], ends: Ends, level: float) -> Forecast:
        """The steps after each end: float64 [N, horizon, D], in the units of values [T_s, D]."""


class Naive:
    """The value one season before, as often as it takes; with a season of 1 the last value.

    The interval h steps ahead is normal, with the errors of the same forecast on the training
    part as its size.

    Args:
        training: [T_s, D] of each series.
        season: steps of a season.
        horizon: steps to forecast.
    """

    def __init__(self, training: Sequence[Tensor], season: int, horizon: int) -> None:
        """See the class."""
        require(season >= 1, f"season must be at least 1, got {season}")
        self.name = "last value" if season == 1 else f"seasonal ({season})"
        steps = torch.arange(1, horizon + 1)
        self._lags = season * ((steps + season - 1) // season)  # [horizon]
        self._errors = torch.stack([self._error(part) for part in training])  # [S, horizon, D]

    def _error(self, part: Tensor) -> Tensor:
        """Root mean square [horizon, D]; of the longest lag there is where the part is short."""
        lags = self._lags.clamp(max=len(part) - 1)
        return torch.stack([(part[lag:] - part[:-lag]).square().mean(0).sqrt() for lag in lags])

    def forecast(self, values: Sequence[Tensor], ends: Ends, level: float) -> Forecast:
        """See `Method`."""
        ahead = torch.arange(len(self._lags))
        center = torch.stack([values[s][(t + ahead - self._lags).clamp(min=0)] for s, t in ends])
        reach = normal_score(level) * self._errors[[s for s, _ in ends]]
        return Forecast(center, center - reach, center + reach, level)


class Linear:
    """An `AutoregressiveModel` of all series together, each normalised by its training part.

    Args:
        training: [T_s, D] of each series.
        normalizers: of each series.
        order: p, at most the steps of the shortest training part.
        horizon: steps to forecast.
    """

    def __init__(
        self,
        training: Sequence[Tensor],
        normalizers: Sequence[Normalizer],
        order: int,
        horizon: int,
    ) -> None:
        """See the class."""
        shortest = min(len(part) for part in training)
        require(
            order <= shortest,
            f"order must be at most the {shortest} steps of the shortest training part, "
            f"got {order}",
        )
        self.name = f"AR({order})"
        self.model = AutoregressiveModel(order, training[0].shape[1])
        self.model.fit(_normalized(training, normalizers))
        self._normalizers, self._horizon = normalizers, horizon

    def forecast(self, values: Sequence[Tensor], ends: Ends, level: float) -> Forecast:
        """See `Method`."""
        p = self.model.order
        z = _normalized(values, self._normalizers)
        history = torch.stack([z[s][t - p : t] for s, t in ends])  # [N, p, D]
        forecast = self.model.forecast(history, self._horizon, level)
        return _in_units(forecast, self._normalizers, ends)


class Network:
    """A trained `SeriesForecaster` that reads each series normalised by its training part.

    Args:
        model: on any device.
        normalizers: of each series.
        horizon: steps to forecast; the model's own, unless futures are sampled.
        paths: futures to sample step by step; 0 forecasts all steps at once.
        seed: of the futures.
    """

    def __init__(
        self,
        model: SeriesForecaster,
        normalizers: Sequence[Normalizer],
        horizon: int,
        paths: int = 0,
        seed: int = 0,
    ) -> None:
        """See the class."""
        own = model.config.horizon
        require(
            paths > 0 or horizon == own,
            f"horizon must be the model's own, {own}, unless futures are sampled, got {horizon}",
        )
        self.model, self.name = model, model.config.network
        self._normalizers, self._horizon = normalizers, horizon
        self._paths, self._seed = paths, seed
        self.widening = 1.0

    def calibrate(self, values: Sequence[Tensor], ends: Ends, level: float) -> None:
        """Scale the intervals so that on these windows they cover what they say.

        A network is surer of itself than it should be: it fits its training windows better than
        others. The factor is the quantile, at the level, of the errors in units of the distance
        from the center to the interval's bound on their side (split conformal prediction, Lei et
        al. 2018, with windows in place of independent samples).
        """
        self.widening = 1.0
        forecast = self.forecast(values, ends, level)
        actual = torch.stack([values[s][t : t + self._horizon] for s, t in ends])
        above = (actual - forecast.center) / (forecast.upper - forecast.center)
        below = (forecast.center - actual) / (forecast.center - forecast.lower)
        self.widening = float(torch.maximum(above, below).flatten().quantile(level))

    def forecast(self, values: Sequence[Tensor], ends: Ends, level: float) -> Forecast:
        """See `Method`."""
        z = _normalized(values, self._normalizers)
        context, device = self.model.config.context, self.model.step.device
        parts = []
        for start in range(0, len(ends), 64):
            some = ends[start : start + 64]
            batch = gather_windows(z, some, context, 0)
            histories = batch.inputs.to(device)
            if not self._paths:
                one = self.model.forecast(histories, level, batch.lengths.to(device))
                parts.append([one.center, one.lower, one.upper])
                continue
            for history, n in zip(histories, batch.lengths.tolist(), strict=True):
                one = self.model.forecast_sampled(
                    history[None, :n], self._horizon, level, self._paths, self._seed
                )
                parts.append([one.center, one.lower, one.upper])
        center, lower, upper = (torch.cat(x).double().cpu() for x in zip(*parts, strict=True))
        lower, upper = (center + self.widening * (bound - center) for bound in (lower, upper))
        return _in_units(Forecast(center, lower, upper, level), self._normalizers, ends)


def _normalized(values: Sequence[Tensor], normalizers: Sequence[Normalizer]) -> list[Tensor]:
    return [one.apply(x) for one, x in zip(normalizers, values, strict=True)]


def _in_units(forecast: Forecast, normalizers: Sequence[Normalizer], ends: Ends) -> Forecast:
    """A forecast [N, horizon, D] of normalised values, in the units of each row's series."""
    mean = torch.stack([normalizers[s].mean for s, _ in ends])[:, None]  # [N, 1, D]
    std = torch.stack([normalizers[s].std for s, _ in ends])[:, None]
    center, lower, upper = (
        bound * std + mean for bound in (forecast.center, forecast.lower, forecast.upper)
    )
    return Forecast(center, lower, upper, forecast.level)


def find_season(values: Tensor) -> int:
    r"""The steps of a season, 1 where none shows.

    Of the changes from step to step, which have no trend, it takes the autocorrelation r and
    scores a season m by the mean of r(m), r(2 m) and r(3 m) as far as they are known. Seasons are
    looked for from the first lag at which r is no longer positive (before it r says only that the
    series is smooth) to a third of the series. The best counts if it is above 0.1 and above four
    times the error that independent changes would give r; of those as good but for that error the
    shortest is taken, because multiples of a season are seasons too.

    Args:
        values: [T].

    Example:
        >>> find_season(torch.sin(torch.arange(200) * 2 * torch.pi / 12))
        12
    """
    changes = values.double().diff()
    n = len(changes)
    error, most = n**-0.5, n // 3
    centered = changes - changes.mean()
    if most < 4 or not bool(centered.any()):
        return 1
    power = torch.fft.rfft(centered, 2 * n).abs().square()
    # By the number of its products: long lags are not held back.
    r = torch.fft.irfft(power, 2 * n)[: 2 * most + 3] / torch.arange(n, n - 2 * most - 3, -1)
    r = r / r[0]
    lags = torch.arange(most + 2)
    multiples = lags[:, None] * torch.arange(1, 4)  # [most + 2, 3]
    known = multiples < len(r)
    terms = r[multiples.clamp(max=len(r) - 1)].where(known, 0)
    score = terms.sum(1) / known.sum(1)  # [most + 2]
    inner = score[1:-1]
    peak = (inner > score[:-2]) & (inner >= score[2:]) & (inner > max(0.1, 4 * error))
    low = r[1 : most + 1] <= 0
    low[0] = r[1] < -0.6  # noise added to the values alone brings the changes' r(1) down to -0.5
    fallen = low.cumsum(0) > 0
    best = inner.where(peak & fallen & (lags[1:-1] >= 2), -1.0)
    if float(best.max()) < 0:
        return 1
    return int((best > float(best.max()) - 2 * error).nonzero()[0]) + 1


def select_order(training: Sequence[Tensor], most: int) -> int:
    r"""The order from 1 to `most` with the least AIC, all fitted to the same steps.

    .. math:: AIC(p) = \log \det \Sigma_p + 2 p D^2 / n

    Args:
        training: [T_s, D] of each series, normalised alike.
        most: largest order to try.

    Source: Luetkepohl 2005, section 4.3.2.
    """
    D = training[0].shape[1]
    n = sum(max(len(part) - most, 0) for part in training)
    scores = []
    for p in range(1, most + 1):
        parts = [part[most - p :] for part in training if len(part) > most]
        if n < p * D + 2:
            break
        covariance = AutoregressiveModel(p, D).fit(parts).covariance
        scores.append(float(torch.logdet(covariance)) + 2 * p * D * D / n)
    return 1 + min(range(len(scores)), key=scores.__getitem__) if scores else 1
