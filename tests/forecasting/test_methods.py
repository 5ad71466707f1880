"""Seasons, baselines, calibration and scores, on series whose answers are known."""

import math

import pytest
import torch

from seqkern.data.series import Normalizer
from seqkern.errors import UserError
from seqkern.forecasting import (
    Linear,
    Naive,
    Network,
    backtest,
    backtest_ends,
    find_season,
    select_order,
    train_forecaster,
)
from seqkern.models import AutoregressiveModel, Forecast, ForecasterConfig, SeriesForecaster

EXACT = torch.float64


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=EXACT)


def autoregressive(T, *coefficients, seed=0):
    """[T, 1] of an AR model with unit noise."""
    x = [0.0] * len(coefficients)
    for e in noise(T + 50, seed=seed).tolist():
        x.append(sum(a * x[-j] for j, a in enumerate(coefficients, 1)) + e)
    return torch.tensor(x[-T:], dtype=EXACT)[:, None]


@pytest.mark.parametrize("season", [2, 4, 7, 12, 24, 52])
@pytest.mark.parametrize("pattern", ["sine", "peak"])
def test_a_season_is_found_under_noise_and_trend(season, pattern):
    t = torch.arange(8 * season + 40, dtype=EXACT)
    wave = torch.cos(2 * math.pi * t / season) if pattern == "sine" else (t % season == 1) * 3.0
    assert find_season(wave + 0.01 * t + 0.1 * noise(len(t))) == season


@pytest.mark.parametrize("seed", range(5))
def test_no_season_is_found_where_there_is_none(seed):
    assert find_season(noise(400, seed=seed).cumsum(0)) == 1
    assert find_season(noise(400, seed=seed)) == 1
    assert find_season(autoregressive(400, 0.8, seed=seed)[:, 0]) == 1


@pytest.mark.parametrize(
    "values", [torch.ones(3), torch.ones(50), torch.arange(50.0)], ids=["short", "flat", "line"]
)
def test_a_series_without_changes_has_no_season(values):
    assert find_season(values) == 1


def test_last_value_and_season_repeat_what_was():
    values = [torch.arange(20, dtype=EXACT)[:, None], 100 + torch.arange(9, dtype=EXACT)[:, None]]
    ends = [(0, 10), (0, 20), (1, 9)]
    last = Naive([v[:8] for v in values], 1, horizon=5).forecast(values, ends, 0.9)
    assert last.center[..., 0].tolist() == [[9] * 5, [19] * 5, [108] * 5]
    seasonal = Naive([v[:8] for v in values], 3, horizon=5).forecast(values, ends, 0.9)
    assert seasonal.center[..., 0].tolist() == [
        [7, 8, 9, 7, 8],
        [17, 18, 19, 17, 18],
        [106, 107, 108, 106, 107],
    ]
    # On a line the errors of the training part are the lags: 3 in the first season, then 6.
    reach = 1.6448536 * torch.tensor([3.0, 3, 3, 6, 6], dtype=EXACT)
    torch.testing.assert_close((seasonal.upper - seasonal.center)[0, :, 0], reach)
    torch.testing.assert_close((seasonal.center - seasonal.lower)[2, :, 0], reach)


def test_last_value_of_a_random_walk_covers_what_it_says():
    walks = [noise(300, 1, seed=s).cumsum(0) for s in range(100)]
    naive = Naive([w[:250] for w in walks], 1, horizon=10)
    ends = [(s, t) for s in range(100) for t in range(250, 290, 10)]
    (score,) = backtest([naive], walks, ends, 10, 0.9, ["y"])
    assert score.coverage == pytest.approx(0.9, abs=0.03)


def test_linear_is_the_autoregressive_model_in_other_units():
    x = 500 + 20 * autoregressive(200, 0.6, 0.3)
    method = Linear([x[:150]], [Normalizer.fit(x[:150])], order=2, horizon=4)
    actual = method.forecast([x], [(0, 150), (0, 171)], 0.8)
    model = AutoregressiveModel(2).fit(x[:150])
    for row, t in enumerate((150, 171)):
        expected = model.forecast(x[:t], 4, 0.8)
        torch.testing.assert_close(actual.center[row], expected.center)
        torch.testing.assert_close(actual.lower[row], expected.lower)
    with pytest.raises(UserError, match="order must be at most the 9 steps of the shortest"):
        Linear([x[:150], x[:9]], [Normalizer.fit(x)] * 2, order=10, horizon=4)


@pytest.mark.parametrize(
    ("coefficients", "expected"), [((0.7,), {1}), ((0.2, 0.6), {2}), ((0, 0, 0, 0.8), {4})]
)
def test_order_is_found_by_aic(coefficients, expected):
    found = [select_order([autoregressive(600, *coefficients, seed=s)], 12) for s in range(5)]
    assert max(set(found), key=found.count) in expected
    assert min(found) >= min(expected)


def test_short_series_have_order_one():
    assert select_order([noise(6, 1)], 5) == 1


class Fixed:
    """Forecasts the same numbers for every window."""

    name = "fixed"

    def forecast(self, values, ends, level):
        center = torch.zeros(len(ends), 2, 1, dtype=EXACT)
        return Forecast(center, center - 1, center + 3, level)


def test_scores_are_what_they_are_called():
    values = [torch.tensor([9.0, 9, 0, 4, -2, 1], dtype=EXACT)[:, None]]
    (score,) = backtest([Fixed()], values, [(0, 2), (0, 4)], 2, 0.9, ["y"])  # 0, 4 and -2, 1
    assert (score.method, score.column, score.windows) == ("fixed", "y", 2)
    assert score.mae == pytest.approx(7 / 4)
    assert score.rmse == pytest.approx(math.sqrt(21 / 4))
    assert score.coverage == pytest.approx(2 / 4)
    assert score.width == 4
    assert score.mae_by_step == pytest.approx((1.0, 2.5))


def test_windows_are_spread_over_what_is_held_back():
    assert backtest_ends([6, 3], [10, 4], 2) == [(0, 6), (0, 7), (0, 8)]
    many = backtest_ends([100, 0], [1100, 500], 10, most=50)
    assert 40 <= len(many) <= 52
    assert all(t >= (100, 0)[s] and t + 10 <= (1100, 500)[s] for s, t in many)
    with pytest.raises(UserError, match="horizon is 5, but at most 4 steps of a series are held"):
        backtest_ends([6, 3], [10, 4], 5)


@pytest.fixture(scope="module")
def network():
    """A network of two series at different levels, trained for a moment."""
    t = torch.arange(120, dtype=EXACT)[:, None]
    values = [torch.sin(t / 2) + 0.2 * noise(120, 1), 1000 + 50 * torch.cos(t[:90] / 2)]
    cuts = [90, 60]
    training = [v[:c] for v, c in zip(values, cuts, strict=True)]
    normalizers = [Normalizer.fit(part) for part in training]
    torch.manual_seed(0)
    model = SeriesForecaster(ForecasterConfig(horizon=4, context=16, hidden=8))
    normal = [n.apply(part) for n, part in zip(normalizers, training, strict=True)]
    ends = [(0, t) for t in range(70, 86)]
    fit = train_forecaster(
        model, normal, validation=ends, cuts=[70, 50], steps=60, lr=1e-2, progress=False
    )
    return values, normalizers, model, fit, ends


def test_a_network_keeps_its_best_step(network):
    _, _, _, fit, _ = network
    assert 1 <= fit.step <= 60
    assert fit.step % 3 == 0
    assert math.isfinite(fit.validation_loss)


def test_a_network_forecasts_every_series_in_its_units(network):
    values, normalizers, model, _, _ = network
    ends = [(0, 95), (1, 70), (1, 7)]
    forecast = Network(model, normalizers, 4).forecast(values, ends, 0.9)
    for row, (s, t) in enumerate(ends):
        z = normalizers[s].apply(values[s][:t]).float()
        expected = model.forecast(z[-16:], 0.9)
        center = normalizers[s].invert(expected.center.double())
        torch.testing.assert_close(forecast.center[row], center, rtol=1e-5, atol=1e-5)
    error = (forecast.center[1] - values[1][70:74]).abs().mean()
    assert error < 25  # the wave goes from 950 to 1050


def test_sampled_forecasts_go_past_the_model_s_horizon(network):
    values, normalizers, model, _, _ = network
    forecast = Network(model, normalizers, 9, paths=20).forecast(values, [(0, 95)], 0.9)
    assert forecast.center.shape == (1, 9, 1)
    assert bool((forecast.lower < forecast.upper).all())
    with pytest.raises(UserError, match="horizon must be the model's own, 4, unless"):
        Network(model, normalizers, 9)


def test_calibrated_intervals_cover_their_level_on_the_windows(network):
    values, normalizers, model, _, ends = network
    method = Network(model, normalizers, 4)
    before = method.forecast(values, ends, 0.7)
    method.calibrate(values, ends, 0.7)
    (score,) = backtest([method], values, ends, 4, 0.7, ["y"])
    assert score.coverage == pytest.approx(0.7, abs=0.02)
    after = method.forecast(values, ends, 0.7)
    torch.testing.assert_close(
        after.upper - after.center, method.widening * (before.upper - before.center)
    )
    assert torch.equal(after.center, before.center)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"steps": 0}, "steps must be at least 1, got 0"), ({"lr": math.nan}, "lr must be above 0")],
)
def test_wrong_training_options_are_refused(options, named):
    model = SeriesForecaster(ForecasterConfig(hidden=4))
    with pytest.raises(UserError, match=named):
        train_forecaster(model, [noise(20, 1)], progress=False, **options)


def test_a_diverged_training_is_one_line():
    model = SeriesForecaster(ForecasterConfig(hidden=4))
    with pytest.raises(UserError, match="training diverged, try a lower lr"):
        train_forecaster(model, [noise(40, 1)], steps=20, lr=1e30, clip=math.inf, progress=False)
