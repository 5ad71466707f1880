"""Splits by time, normalisation of the training part, windows of different lengths."""

import numpy as np
import pytest
import torch

from seqkern.data.series import (
    Normalizer,
    WindowSampler,
    gather_windows,
    make_series,
    split_by_time,
    time_cuts,
)
from seqkern.errors import UserError


def numbered(T, first=0):
    """[T, 1]: first, first + 1, .."""
    return torch.arange(first, first + T, dtype=torch.float64)[:, None]


def test_one_moment_cuts_all_series():
    early = make_series(numbered(10), np.arange(0, 10), name="early")
    late = make_series(numbered(10), np.arange(6, 16), name="late")
    series = [early, late]
    assert time_cuts(series, 0.25) == [10, 5]
    training, validation = split_by_time(series, 0.25)
    assert [(one.name, len(one)) for one in training] == [("early", 10), ("late", 5)]
    assert [(one.name, len(one)) for one in validation] == [("late", 5)]
    assert max(one.stamps.max() for one in training) < min(one.stamps.min() for one in validation)
    assert validation[0].values[0] == 5


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_a_single_series_is_cut_at_its_fraction(fraction):
    series = make_series(numbered(100))
    assert time_cuts([series], fraction) == [100 - int(100 * fraction)]


def test_wrong_splits_are_refused():
    dated = make_series([1, 2], np.array(["2024-01-01", "2024-01-02"], "datetime64[D]"))
    with pytest.raises(UserError, match=r"fraction must be in \[0, 1\), got 1"):
        time_cuts([dated], 1)
    with pytest.raises(UserError, match="got both or no series"):
        time_cuts([dated, make_series([1, 2])], 0.5)


def test_normaliser_is_of_the_training_part_and_inverts():
    x = torch.cat([torch.randn(50, 2, dtype=torch.float64), torch.full((10, 2), 1e6).double()])
    fitted = Normalizer.fit(x[:50])
    z = fitted.apply(x)
    torch.testing.assert_close(z[:50].mean(0), torch.zeros(2).double())
    torch.testing.assert_close(z[:50].std(0), torch.ones(2).double())
    torch.testing.assert_close(fitted.invert(z), x)


def test_constant_columns_are_refused():
    x = torch.stack([torch.arange(5.0), torch.full((5,), 3.0)], 1)
    with pytest.raises(UserError, match=r"column b is constant \(3\) in the training part"):
        Normalizer.fit(x, ["a", "b"])


def test_windows_read_what_comes_before_and_target_what_follows():
    batch = gather_windows([numbered(10), numbered(6, 100)], [(0, 7), (1, 2)], 4, 2)
    assert batch.lengths.tolist() == [4, 2]
    assert batch.inputs[..., 0].tolist() == [[3, 4, 5, 6], [100, 101, 0, 0]]
    assert batch.future[..., 0].tolist() == [[7, 8], [102, 103]]
    assert batch.within.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.targets[0, ..., 0].tolist() == [[4, 5], [5, 6], [6, 7], [7, 8]]
    assert batch.targets[1, :2, :, 0].tolist() == [[101, 102], [102, 103]]


def test_sampler_draws_every_window_of_every_series_and_no_other():
    values = [numbered(9), numbered(3, 100), numbered(5, 200)]
    sampler = WindowSampler(values, context=4, horizon=3, batch_size=500, seed=0)
    batch = sampler.draw()
    last = batch.inputs[torch.arange(500), batch.lengths - 1, 0]
    assert set(last.tolist()) == {0, 1, 2, 3, 4, 5, 200, 201}  # no window in the second series
    assert bool((batch.future[:, 0, 0] == last + 1).all())
    assert bool((batch.future[:, 2, 0] == last + 3).all())
    first = batch.inputs[:, 0, 0]
    assert bool((batch.lengths == (last - first).long() + 1).all())
    assert set(batch.lengths.tolist()) == {1, 2, 3, 4}
    counts = torch.bincount(last.long())[[0, 5, 200]]
    assert bool(((counts > 30) & (counts < 100)).all())  # 62 of 500 expected


def test_sampler_depends_on_the_seed_alone():
    def draws(seed):
        sampler = WindowSampler([numbered(50)], 4, 1, 8, seed)
        torch.rand(3)
        return torch.cat([sampler.draw().values for _ in range(3)])

    assert torch.equal(draws(1), draws(1))
    assert not torch.equal(draws(1), draws(2))


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((4, 10, 8), "a horizon of 10 needs 11 steps, the longest series has 10"),
        ((0, 1, 8), "context must be at least 1, got 0"),
        ((4, 0, 8), "horizon must be at least 1, got 0"),
        ((4, 1, 0), "batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_sizes_are_refused(sizes, named):
    with pytest.raises(UserError, match=named):
        WindowSampler([numbered(10), numbered(4)], *sizes, seed=0)
