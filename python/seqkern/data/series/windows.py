"""Training, validation and backtest parts of series, and the windows that models read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seqkern.data.series.table import Series
from seqkern.errors import require


def time_cuts(series: Sequence[Series], fraction: float) -> list[int]:
    """Where each series is cut so that the latest `fraction` of all steps comes after.

    One moment cuts all series, so that nothing of the training part happens after anything that
    is held back. Series without stamps of their own count their steps from 0, as if they had
    begun together.

    Args:
        series: one or more, their stamps all dates or all numbers.
        fraction: of all steps together, in [0, 1).

    Returns:
        For each series the number of steps before the cut, from 0 to its length.

    Raises:
        UserError: a fraction out of range, or dates beside numbers.

    Example:
        >>> time_cuts([make_series(torch.arange(10.0)), make_series(torch.arange(6.0))], 0.25)
        [6, 6]
    """
    require(0 <= fraction < 1, f"fraction must be in [0, 1), got {fraction}")
    kinds = {one.stamps.dtype.kind == "M" for one in series}
    require(len(kinds) == 1, "series must have dates or numbers as stamps, got both or no series")
    stamps = np.sort(np.concatenate([one.stamps for one in series]))
    held = int(len(stamps) * fraction)
    if held == 0:
        return [len(one) for one in series]
    cut = stamps[len(stamps) - held]
    return [int(np.searchsorted(one.stamps, cut)) for one in series]


def split_by_time(series: Sequence[Series], fraction: float) -> tuple[list[Series], list[Series]]:
    """Training and validation parts: what comes before and after the moment of `time_cuts`.

    A series that has no step on one side is left out there. Arguments and errors are those of
    `time_cuts`.

    Example:
        >>> training, validation = split_by_time([make_series(torch.arange(10.0))], 0.2)
        >>> len(training[0]), validation[0].stamps.tolist()
        (8, [8, 9])
    """
    cuts = time_cuts(series, fraction)
    pairs = list(zip(series, cuts, strict=True))
    training = [one.part(0, cut) for one, cut in pairs if cut > 0]
    return training, [one.part(cut, len(one)) for one, cut in pairs if cut < len(one)]


def check_scale(what: str, values: Tensor, std: Tensor) -> None:
    """Raise `UserError` for values [T] whose standard deviation is no number to divide by."""
    require(
        bool(torch.isfinite(std)) and bool(1 / std < math.inf),
        f"{what}: its values, {float(values.min()):g} to {float(values.max()):g}, are too large "
        f"or too close to one another for {values.dtype}: scale or shift them",
    )


@dataclass(frozen=True)
class Normalizer:
    """z = (x - mean) / std of each column, fitted on a training part.

    Example:
        >>> normalizer = Normalizer.fit(torch.tensor([[1.0], [3.0]]))
        >>> normalizer.invert(normalizer.apply(torch.tensor([[4.0]])))
        tensor([[4.]])
    """

    mean: Tensor  # [D]
    std: Tensor  # [D]

    @staticmethod
    def fit(values: Tensor, columns: Sequence[str] | None = None) -> "Normalizer":
        """Of values [T, D]; `UserError` for a column that is constant."""
        for d in range(values.shape[1]):
            column = values[:, d]
            name = columns[d] if columns else str(d)
            require(
                bool((column != column[0]).any()),
                f"column {name} is constant ({float(column[0]):g}) in the training part: there "
                "is nothing to forecast",
            )
        normalizer = Normalizer(values.mean(0), values.std(0))
        for d in range(values.shape[1]):
            check_scale(f"column {columns[d] if columns else d}", values[:, d], normalizer.std[d])
        return normalizer

    def apply(self, x: Tensor) -> Tensor:
        """Values [..., D] to normalised ones."""
        return (x - self.mean) / self.std

    def invert(self, z: Tensor) -> Tensor:
        """Normalised values [..., D] to values."""
        return z * self.std + self.mean


@dataclass(frozen=True)
class WindowBatch:
    """Windows of different lengths: row b reads `lengths[b]` steps, and `horizon` follow them."""

    values: Tensor  # [B, L + horizon, D], zero from lengths[b] + horizon on
    lengths: Tensor  # [B] int64, from 1 to L
    horizon: int

    @property
    def within(self) -> Tensor:
        """[B, L]: whether a position is one of its row's."""
        L = self.values.shape[1] - self.horizon
        return torch.arange(L, device=self.lengths.device) < self.lengths[:, None]

    @property
    def inputs(self) -> Tensor:
        """[B, L, D], zero past a row's length."""
        L = self.values.shape[1] - self.horizon
        return self.values[:, :L] * self.within[..., None]

    @property
    def targets(self) -> Tensor:
        """[B, L, horizon, D]: the steps after each position; meaningless past a row's length."""
        return self.values[:, 1:].unfold(1, self.horizon, 1).transpose(2, 3)

    @property
    def future(self) -> Tensor:
        """[B, horizon, D]: the steps after each row's last position."""
        rows = torch.arange(len(self.lengths), device=self.lengths.device)
        return self.targets[rows, self.lengths - 1]


def gather_windows(
    values: Sequence[Tensor], ends: Sequence[tuple[int, int]], context: int, horizon: int
) -> WindowBatch:
    """The windows that end before given steps.

    Args:
        values: [T_s, D] of each series.
        ends: (s, t): the window of series s that reads steps max(0, t - context) .. t - 1, and is
            followed by t .. t + horizon - 1.
        context: L, the most steps to read.
        horizon: steps that follow.
    """
    D = values[0].shape[1]
    lengths = [min(t, context) for _, t in ends]
    padded = values[0].new_zeros(len(ends), context + horizon, D)
    for row, ((s, t), n) in enumerate(zip(ends, lengths, strict=True)):
        padded[row, : n + horizon] = values[s][t - n : t + horizon]
    return WindowBatch(padded, torch.tensor(lengths), horizon)


class WindowSampler:
    """Random windows over one or many series of different lengths.

    The end of a window is drawn uniformly over all places that `horizon` steps follow, so a series
    counts by its length. A window reads the `context` steps before its end, or as many as there
    are. What is drawn depends on the seed and on nothing else.

    Args:
        values: [T_s, D] of each series; those without a single window are left out.
        context: L, the most steps a window reads.
        horizon: steps that follow it.
        batch_size: B.
        seed: of the draws.

    Raises:
        UserError: no series has horizon + 1 steps, or a size is below 1.

    Example:
        >>> sampler = WindowSampler([torch.randn(30, 1), torch.randn(9, 1)], 16, 4, 8, seed=0)
        >>> sampler.draw().inputs.shape
        torch.Size([8, 16, 1])
    """

    def __init__(
        self, values: Sequence[Tensor], context: int, horizon: int, batch_size: int, seed: int
    ) -> None:
        """See the class."""
        sizes = {"context": context, "horizon": horizon, "batch_size": batch_size}
        for name, size in sizes.items():
            require(size >= 1, f"{name} must be at least 1, got {size}")
        self._values = list(values)
        self._sizes = (context, horizon)
        self._batch_size = batch_size
        counts = torch.tensor([max(len(x) - horizon, 0) for x in self._values])
        longest = max((len(x) for x in self._values), default=0)
        require(
            bool((counts > 0).any()),
            f"the training part is too short: a horizon of {horizon} needs {horizon + 1} steps, "
            f"the longest series has {longest}",
        )
        self._ends = counts.cumsum(0)  # [S]
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> WindowBatch:
        """The next batch."""
        drawn = torch.randint(int(self._ends[-1]), (self._batch_size,), generator=self._generator)
        which = torch.searchsorted(self._ends, drawn, right=True)
        before = torch.cat([torch.zeros(1, dtype=torch.int64), self._ends])[which]
        ends = list(zip(which.tolist(), (drawn - before + 1).tolist(), strict=True))
        return gather_windows(self._values, ends, *self._sizes)
