"""Forecasting networks: their distributions, causality, lengths, and both ways to forecast."""

import math

import pytest
import torch
from torch.distributions import Normal

from seqkern.data.series import WindowSampler, gather_windows
from seqkern.errors import UserError
from seqkern.models import ForecasterConfig, SeriesForecaster
from seqkern.models.forecast_heads import GaussianHead, QuantileHead

EXACT = torch.float64


def make(network="lstm", head="gaussian", backend="seqkern", seed=0, **sizes):
    """A model whose outputs depend on everything it reads."""
    torch.manual_seed(seed)
    config = {"columns": 2, "horizon": 3, "context": 12, "hidden": 8, "heads": 2} | sizes
    model = SeriesForecaster(ForecasterConfig(network=network, head=head, **config), backend)
    torch.nn.init.normal_(model.output.weight, std=0.3)
    model.step.copy_(torch.tensor([0.5, 2.0])[: config["columns"]])
    return model.double()


def values(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=EXACT)


@pytest.fixture(params=["lstm", "gpt"])
def network(request):
    return request.param


@pytest.fixture(params=["gaussian", "quantile"])
def head(request):
    return request.param


def heads():
    return [
        GaussianHead(),
        QuantileHead((0.1, 0.5, 0.9)).double(),
        QuantileHead((0.2, 0.3)).double(),
    ]


@pytest.mark.parametrize("head", heads(), ids=["gaussian", "quantile 3", "quantile 2"])
def test_head_is_one_distribution(head):
    """Its density integrates to the probabilities of its values, at zero those of N(0, 1)."""
    z = torch.linspace(-5, 5, 4001, dtype=EXACT)
    for outputs in (torch.zeros(head.size, dtype=EXACT), 0.7 * values(head.size)):
        params = outputs.expand(len(z), head.size)
        x = head.value(params, z)
        assert bool((x.diff() > 0).all())
        density = head.log_prob(params, x).exp()
        mass = torch.cumulative_trapezoid(density, x)
        expected = Normal(0, 1).cdf(z[1:]) - Normal(0, 1).cdf(z[:1])
        torch.testing.assert_close(mass, expected, atol=2e-3, rtol=0)
        if not outputs.any():
            torch.testing.assert_close(x, z, rtol=1e-6, atol=1e-6)


def test_quantile_head_goes_through_its_quantiles():
    head = QuantileHead((0.1, 0.25, 0.5, 0.9)).double()
    outputs = values(5, 4)
    z = Normal(0, 1).icdf(head.probabilities).expand(5, 4)
    at = torch.stack([head.value(outputs, z[:, k]) for k in range(4)], dim=1)
    torch.testing.assert_close(at, head.quantiles(outputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head", heads()[:2], ids=["gaussian", "quantile"])
def test_the_loss_is_least_at_the_true_distribution(head):
    """Fitted to draws of N(3, 2^2) alone, the outputs give its quantiles."""
    draws = 3 + 2 * values(4000)
    outputs = torch.zeros(head.size, dtype=EXACT, requires_grad=True)
    optimizer = torch.optim.LBFGS([outputs], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = head.loss(outputs.expand(len(draws), head.size), draws).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    z = torch.tensor([-1.2816, 0.0, 1.2816], dtype=EXACT)
    at = head.value(outputs.detach().expand(3, head.size), z)
    torch.testing.assert_close(at, 3 + 2 * z, atol=0.15, rtol=0)


def test_a_new_model_forecasts_a_random_walk(network, head):
    torch.manual_seed(0)
    config = ForecasterConfig(horizon=4, network=network, head=head, hidden=8, heads=2)
    model = SeriesForecaster(config)
    walk = 5 + 0.1 * values(50, 1).cumsum(0)
    model.fit_step([walk])
    forecast = model.forecast(walk, level=0.8)
    torch.testing.assert_close(forecast.center, walk[-1:].expand(4, 1).float())
    reach = 1.2816 * model.step * torch.arange(1, 5)[:, None].sqrt()
    torch.testing.assert_close(forecast.upper - forecast.center, reach, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(forecast.center - forecast.lower, reach, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changed", [0, 5, 9])
def test_a_later_value_changes_no_earlier_output(network, head, changed):
    model = make(network, head).eval()
    x = values(2, 10, 2)
    y = x.clone()
    y[:, changed] += 1
    before, after = model(x)[0], model(y)[0]
    torch.testing.assert_close(before[:, :changed], after[:, :changed])
    assert bool((before[:, changed:] != after[:, changed:]).flatten(2).any(-1).all())


@pytest.mark.parametrize("piece", [1, 3])
def test_reading_in_pieces_gives_the_outputs_of_one_reading(network, piece):
    model, x = make(network).eval(), values(2, 12, 2)
    whole, _ = model(x)
    state, parts = None, []
    for part in x.split(piece, dim=1):
        outputs, state = model(part, state)
        parts.append(outputs)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_log_prob_is_the_chain_rule(network, head):
    model, x = make(network, head), values(3, 9, 2)
    lengths = torch.tensor([9, 1, 4])
    actual = model.log_prob(x, lengths)
    for row, n in enumerate(lengths):
        expected = torch.zeros((), dtype=EXACT)
        for t in range(1, n):
            outputs, _ = model.eval()(x[row : row + 1, :t])
            r = (x[row, t] - x[row, t - 1]) / model.step
            density = model.head.log_prob(outputs[0, -1, 0], r) - model.step.log()
            expected = expected + density.sum()
        torch.testing.assert_close(actual[row], expected)
    assert actual[1] == 0
    actual.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_row_depends_on_neither_padding_nor_neighbours(network, head):
    """Bit for bit, in a batch of the same shape."""
    model, x = make(network, head), values(4, 12, 2)
    lengths = torch.tensor([5, 12, 1, 7])
    y = values(4, 12, 2, seed=2)
    y[0, :5], y[0, 5:] = x[0, :5], math.nan
    other = torch.tensor([5, 3, 12, 12])
    assert model.log_prob(x, lengths)[0] == model.log_prob(y, other)[0]
    ours, theirs = model.forecast(x, lengths=lengths), model.forecast(y, lengths=other)
    assert torch.equal(ours.center[0], theirs.center[0])
    assert torch.equal(ours.upper[0], theirs.upper[0])


def test_rows_of_different_lengths_are_forecast_as_alone(network, head):
    model, x = make(network, head), values(4, 12, 2)
    lengths = torch.tensor([5, 12, 1, 7])
    together = model.forecast(x, lengths=lengths)
    for row, n in enumerate(lengths):
        alone = model.forecast(x[row, :n])
        torch.testing.assert_close(together.center[row], alone.center)
        torch.testing.assert_close(together.lower[row], alone.lower)


def test_loss_is_the_mean_over_all_positions_of_all_windows(network, head):
    model = make(network, head).eval()
    series = [values(20, 2), values(6, 2, seed=3)]
    windows = [(0, 9), (1, 2), (1, 3)]
    together = model.loss(gather_windows(series, windows, 6, 3))
    losses, counts = [], []
    for window in windows:
        batch = gather_windows(series, [window], 6, 3)
        losses.append(model.loss(batch))
        counts.append(int(batch.lengths))
    expected = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(together, expected)


def test_gaussian_loss_is_the_log_likelihood_of_log_prob(network):
    """With a horizon of 1, up to the change of units."""
    model, x = make(network, horizon=1).eval(), values(1, 9, 2)
    loss = model.loss(gather_windows([x[0]], [(0, 8)], 8, 1))
    expected = -(model.log_prob(x)[0] / 8 + model.step.log().sum()) / 2
    torch.testing.assert_close(loss, expected)


def test_sampled_futures_have_the_model_s_distribution(network, head):
    """One step of many paths: each direct quantile has its share of the draws below it."""
    model, x = make(network, head, horizon=1), values(2, 8, 2)
    direct = model.forecast(x, level=0.8)
    futures = model.sample(x, 1, paths=20_000)  # [2, paths, 1, 2]
    for bound, share in ((direct.lower, 0.1), (direct.center, 0.5), (direct.upper, 0.9)):
        below = (futures < bound[:, None]).double().mean(1)
        assert (below - share).abs().max() < 0.015


def test_sampled_forecast_is_the_quantiles_of_the_paths(network):
    model, x = make(network), values(2, 8, 2)
    futures = model.sample(x, 5, paths=101, seed=4).sort(dim=1).values
    forecast = model.forecast_sampled(x, 5, level=0.8, paths=101, seed=4)
    torch.testing.assert_close(forecast.center, futures[:, 50])
    torch.testing.assert_close(forecast.lower, futures[:, 10])
    torch.testing.assert_close(forecast.upper, futures[:, 90])


def test_sampling_reads_what_it_has_drawn(network, head):
    """Each step is the value at the drawn score under what the whole path so far makes."""
    model, x = make(network, head), values(1, 6, 2)
    futures = model.sample(x, 4, paths=1, seed=3)[0]  # [1, 4, 2]
    generator = torch.Generator().manual_seed(3)
    z = [torch.randn(1, 1, 2, generator=generator, dtype=EXACT)[0, 0] for _ in range(4)]
    whole = torch.cat([x, futures], dim=1)
    outputs, _ = model.eval()(whole)
    for h in range(4):
        t = 5 + h
        moved = whole[0, t] + model.step * model.head.value(outputs[0, t, 0], z[h])
        torch.testing.assert_close(whole[0, t + 1], moved)


def test_futures_go_on_past_the_context_and_repeat_by_seed(network):
    model, x = make(network), values(30, 2)
    futures = model.sample(x, 25, paths=3, seed=1)
    assert futures.shape == (3, 25, 2)
    assert bool(torch.isfinite(futures).all())
    assert torch.equal(futures, model.sample(x, 25, paths=3, seed=1))
    assert torch.equal(futures, model.sample(x[-12:], 25, paths=3, seed=1))
    assert not torch.equal(futures, model.sample(x, 25, paths=3, seed=2))


def test_backends_agree(network, head):
    ours, theirs = (make(network, head, backend) for backend in ("seqkern", "torch"))
    x = values(3, 10, 2)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x), rtol=1e-10, atol=1e-10)


def test_dropout_is_for_training_alone(network):
    model, x = make(network, dropout=0.5).train(), values(2, 8, 2)
    assert torch.equal(model.log_prob(x), model.log_prob(x))
    assert torch.equal(model.forecast(x).center, model.forecast(x).center)
    assert model.training
    assert not torch.equal(model(x)[0], model(x)[0])


def test_training_on_windows_learns_a_seasonal_series(network, head):
    """Two series of different lengths and phases: beats the last value by far."""
    t = torch.arange(160, dtype=EXACT)[:, None]
    series = [torch.sin(t * math.pi / 6), torch.sin((t[:50] + 4) * math.pi / 6)]
    torch.manual_seed(0)
    config = ForecasterConfig(horizon=6, network=network, head=head, context=24, hidden=16, heads=2)
    model = SeriesForecaster(config)
    model.fit_step(series)
    sampler = WindowSampler(series, 24, 6, batch_size=16, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model.loss(sampler.draw())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ends = [(0, end) for end in range(30, 154, 5)]
    batch = gather_windows(series, ends, 24, 6)
    error = (model.forecast(batch.inputs, lengths=batch.lengths).center - batch.future).abs()
    last = (batch.inputs[:, -1:] - batch.future).abs()
    assert error.mean() < 0.35 * last.mean()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"network": "rnn"}, "network must be one of lstm, gpt, got 'rnn'"),
        ({"head": "beta"}, "head must be one of gaussian, quantile, got 'beta'"),
        ({"horizon": 0}, "horizon must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"network": "gpt", "hidden": 10, "heads": 4}, "multiple of heads = 4, got 10"),
        ({"head": "quantile", "quantiles": (0.5,)}, "at least 2 increasing numbers"),
        ({"head": "quantile", "quantiles": (0.5, 0.1)}, r"increasing numbers in \(0, 1\)"),
        ({"head": "quantile", "quantiles": (0.5, 1.0)}, r"increasing numbers in \(0, 1\)"),
    ],
)
def test_impossible_sizes_are_refused(config, named):
    with pytest.raises(UserError, match=named):
        SeriesForecaster(ForecasterConfig(**config))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m: m.forecast(values(8)), r"history must be \[B, T, 2\] .*, got \[8\]"),
        (lambda m: m.forecast(values(8, 3)), r"history must be \[B, T, 2\]"),
        (lambda m: m.forecast(values(8, 2) / 0), "history must be finite, got .* at step 0"),
        (lambda m: m.forecast(values(8, 2), level=0), r"level must be in \(0, 1\), got 0"),
        (lambda m: m.forecast(values(1, 20, 2), lengths=torch.tensor([3])), "context of 12 long"),
        (lambda m: m.forecast(values(1, 8, 2), lengths=torch.tensor([9])), r"in \[1, 8\], got 9"),
        (lambda m: m.sample(values(8, 2), 0), "horizon must be at least 1, got 0"),
        (lambda m: m.sample(values(8, 2), 1, paths=0), "paths must be at least 1, got 0"),
        (lambda m: m.log_prob(values(8, 2)), r"sequences must be \[B, T, 2\]"),
        (lambda m: m.log_prob(values(1, 8, 2), torch.tensor([0])), r"in \[1, 8\], got 0"),
        (lambda m: m.fit_step([values(1, 2)]), "at least 2 steps"),
    ],
)
def test_wrong_arguments_are_refused(network, call, named):
    with pytest.raises(UserError, match=named):
        call(make(network))


def test_a_transformer_reads_no_more_than_its_context():
    with pytest.raises(UserError, match="at most its context of 12 steps, got 13"):
        make("gpt").log_prob(values(1, 14, 2))
