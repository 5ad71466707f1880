"""The linear autoregressive model, against statsmodels on its own series."""

import math

import numpy as np
import pytest
import torch
from statsmodels.datasets import co2, macrodata, sunspots
from statsmodels.tsa.ar_model import AutoReg
from statsmodels.tsa.vector_ar.var_model import VAR

from seqkern.data.series import make_series
from seqkern.errors import UserError
from seqkern.models import AutoregressiveModel


def close(actual, expected, **tolerances):
    expected = torch.from_numpy(np.array(expected, dtype=np.float64))  # writable, in C order
    torch.testing.assert_close(actual, expected, **{"rtol": 1e-6, "atol": 1e-6} | tolerances)


def yearly_sunspots():
    return sunspots.load_pandas().data["SUNACTIVITY"].to_numpy()


def macro():
    """Quarterly growth of GDP, consumption and investment."""
    table = macrodata.load_pandas().data[["realgdp", "realcons", "realinv"]]
    return np.diff(np.log(table.to_numpy()), axis=0)


@pytest.mark.parametrize("order", [1, 2, 9])
def test_sunspots_as_statsmodels_fits_them(order):
    values = yearly_sunspots()
    theirs = AutoReg(values, order).fit()
    model = AutoregressiveModel(order).fit(torch.from_numpy(values))
    close(model.intercept[0], theirs.params[0])
    close(model.coefficients[:, 0, 0], theirs.params[1:])
    close(model.covariance[0, 0], theirs.sigma2)
    close(model.log_prob(torch.from_numpy(values)[None])[0], theirs.llf)


@pytest.mark.parametrize("order", [1, 6])
def test_co2_as_statsmodels_fits_it_once_its_gaps_are_filled(order):
    table = co2.load_pandas().data["co2"]
    with pytest.raises(UserError, match="59 values are missing, the first is co2 at 1958-05-10"):
        make_series(table.to_numpy(), table.index.to_numpy(), columns=["co2"])
    series = make_series(table.to_numpy(), table.index.to_numpy(), fill="linear")
    assert (series.interval.text, series.filled) == ("7 days", 59)
    filled = table.interpolate().to_numpy()
    theirs = AutoReg(filled, order).fit()
    model = AutoregressiveModel(order).fit(series.values)
    close(model.intercept[0], theirs.params[0])
    close(model.coefficients[:, 0, 0], theirs.params[1:])
    close(model.covariance[0, 0], theirs.sigma2)
    n = len(filled)
    prediction = theirs.get_prediction(n, n + 51)
    forecast = model.forecast(series.values[:, 0], 52)
    close(forecast.center, prediction.predicted_mean)
    close(forecast.lower, prediction.conf_int()[:, 0])


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_forecast_and_interval_are_those_of_statsmodels(level):
    values = yearly_sunspots()
    n, horizon = len(values), 30
    theirs = AutoReg(values, 9).fit().get_prediction(n, n + horizon - 1)
    history = torch.from_numpy(values)
    ours = AutoregressiveModel(9).fit(history).forecast(history, horizon, level)
    interval = theirs.conf_int(alpha=1 - level)
    close(ours.center, theirs.predicted_mean)
    close(ours.lower, interval[:, 0])
    close(ours.upper, interval[:, 1])
    assert ours.level == level


def test_several_columns_as_statsmodels_fits_them():
    values = macro()
    theirs = VAR(values).fit(2)
    history = torch.from_numpy(values)
    model = AutoregressiveModel(2, columns=3).fit(history)
    close(model.intercept, theirs.params[0], rtol=1e-9)
    close(model.coefficients, theirs.coefs, rtol=1e-9)
    close(model.covariance, theirs.sigma_u_mle, rtol=1e-9, atol=1e-12)
    close(model.moving_average(11), theirs.ma_rep(10))
    close(model.log_prob(history[None])[0], theirs.llf)
    ours = model.forecast(history, 10)
    close(ours.center, theirs.forecast(values[-2:], 10))
    # statsmodels' interval takes the covariance divided by the degrees of freedom.
    rows = len(values) - 2
    reach = math.sqrt((rows - 7) / rows) * (theirs.forecast_interval(values[-2:], 10)[2])
    center = ours.center.numpy()
    close(ours.upper, center + reach - math.sqrt((rows - 7) / rows) * center)


def simulate(T, seed):
    """[T, 2] of a known, stable model of order 1."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.tensor([[0.5, 0.2], [-0.3, 0.7]], dtype=torch.float64)
    noise = torch.randn(T, 2, generator=generator, dtype=torch.float64)
    x = [torch.zeros(2, dtype=torch.float64)]
    for e in noise:
        x.append(torch.tensor([1.0, 2.0], dtype=torch.float64) + A @ x[-1] + e)
    return torch.stack(x[1:]), A


def test_parameters_of_a_simulated_series_are_found():
    series, A = simulate(4000, seed=1)
    model = AutoregressiveModel(1, columns=2).fit(series)
    torch.testing.assert_close(model.coefficients[0], A, atol=0.05, rtol=0)
    torch.testing.assert_close(
        model.covariance, torch.eye(2, dtype=torch.float64), atol=0.08, rtol=0
    )


def test_intervals_cover_what_they_say():
    """The share of 600 simulated futures inside the interval is its level at every step."""
    model = AutoregressiveModel(1, columns=2)
    model.intercept.copy_(torch.tensor([1.0, 2.0]))
    model.coefficients[0] = simulate(1, 0)[1]
    futures = torch.stack([simulate(12, seed)[0] for seed in range(600)])  # [600, 12, 2]
    forecast = model.forecast(torch.zeros(1, 2), 12, level=0.8)
    inside = (futures >= forecast.lower) & (futures <= forecast.upper)
    torch.testing.assert_close(
        inside.double().mean(0), torch.full((12, 2), 0.8).double(), atol=0.07, rtol=0
    )


def test_several_series_are_fitted_as_their_joined_rows():
    a, b = simulate(50, 1)[0], simulate(31, 2)[0]
    model = AutoregressiveModel(2, columns=2).fit([a, b])
    rows = [(s[t], torch.cat([s[t - 1], s[t - 2]])) for s in (a, b) for t in range(2, len(s))]
    y, lags = (torch.stack(part) for part in zip(*rows, strict=True))
    design = torch.cat([torch.ones(len(y), 1, dtype=torch.float64), lags], 1)
    expected = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(model.intercept, expected[0])
    torch.testing.assert_close(model.coefficients, expected[1:].view(2, 2, 2).transpose(1, 2))


def test_columns_of_very_different_sizes_are_fitted_alike():
    series = simulate(300, 3)[0]
    sizes = torch.tensor([1e8, 1e-6], dtype=torch.float64)
    plain, sized = (AutoregressiveModel(3, columns=2).fit(s) for s in (series, series * sizes))
    torch.testing.assert_close(sized.coefficients * sizes / sizes[:, None], plain.coefficients)
    torch.testing.assert_close(sized.intercept / sizes, plain.intercept)


def test_a_batch_is_forecast_row_by_row():
    series = simulate(60, 4)[0]
    model = AutoregressiveModel(2, columns=2).fit(series)
    batch = torch.stack([series[:20], series[20:40]])
    together = model.forecast(batch, 5)
    for row, history in enumerate(batch):
        alone = model.forecast(history, 5)
        torch.testing.assert_close(together.center[row], alone.center)
        torch.testing.assert_close(together.upper[row], alone.upper)


def test_log_prob_depends_on_no_padding_and_adds_up():
    series = simulate(40, 5)[0]
    model = AutoregressiveModel(2, columns=2).fit(series)
    x = torch.stack([series[:9], series[9:18], series[18:27]])
    lengths = torch.tensor([9, 5, 2])
    padded = x.clone()
    padded[1, 5:], padded[2, 2:] = math.nan, 1e300
    actual = model.log_prob(padded, lengths)
    torch.testing.assert_close(actual[1], model.log_prob(x[1:2, :5])[0])
    assert actual[2] == 0
    assert torch.equal(actual, model.log_prob(x, lengths))
    steps = [model.log_prob(x[:1, t - 2 : t + 1])[0] for t in range(2, 9)]
    torch.testing.assert_close(actual[0], torch.stack(steps).sum())
    assert torch.equal(model.log_prob(x[:, :2]), torch.zeros(3).double())


def test_state_dict_holds_the_model():
    series = simulate(60, 6)[0]
    model = AutoregressiveModel(2, columns=2).fit(series)
    other = AutoregressiveModel(2, columns=2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.forecast(series, 4).lower, model.forecast(series, 4).lower)


def test_a_straight_line_is_continued():
    line = 3.0 + 0.5 * torch.arange(40, dtype=torch.float64)
    forecast = AutoregressiveModel(2).fit(line).forecast(line, 3)
    torch.testing.assert_close(forecast.center, 3.0 + 0.5 * torch.arange(40, 43).double())


T = torch.arange(20.0)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: AutoregressiveModel(0), "order must be at least 1, got 0"),
        (lambda: AutoregressiveModel(1, columns=0), "columns must be at least 1, got 0"),
        (lambda: AutoregressiveModel(1).fit(torch.ones(9)), "column 0 of series is constant"),
        (
            lambda: AutoregressiveModel(1).fit(torch.where(T == 7, math.nan, T)),
            "series must be finite, got nan at step 7",
        ),
        (lambda: AutoregressiveModel(9).fit(T[:19]), "needs 11 steps after the first 9, got 10"),
        (lambda: AutoregressiveModel(9).fit(T[:3]), "needs 11 steps after the first 9, got 0"),
        (lambda: AutoregressiveModel(1, 2).fit(T), r"series must be \[T, 2\], got \[20\]"),
        (lambda: AutoregressiveModel(2).forecast(T[:1], 3), "at least order = 2 steps, got 1"),
        (lambda: AutoregressiveModel(2).forecast(T, 0), "horizon must be at least 1, got 0"),
        (lambda: AutoregressiveModel(2).forecast(T, 1, 1.0), r"level must be in \(0, 1\)"),
        (lambda: AutoregressiveModel(2).forecast(1 / T, 1), "be finite, got inf at step 0"),
        (lambda: AutoregressiveModel(1).forecast(torch.ones(2, 3, 4), 1), "have 1 columns"),
        (lambda: AutoregressiveModel(1).log_prob(T), r"sequences must be \[B, T, 1\]"),
        (lambda: AutoregressiveModel(1).log_prob(T[None], torch.tensor([21])), r"in \[1, 20\]"),
    ],
)
def test_wrong_arguments_are_refused(call, named):
    with pytest.raises(UserError, match=named):
        call()


def test_a_singular_covariance_has_no_density():
    x = simulate(50, 7)[0][:, :1]
    model = AutoregressiveModel(1, columns=2).fit(torch.cat([x, 2 * x], 1))
    with pytest.raises(UserError, match="singular"):
        model.log_prob(torch.zeros(1, 5, 2))
