"""What every forecasting model returns, and what it asks of its arguments."""

from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from seqkern.errors import UserError, require


@dataclass(frozen=True)
class Forecast:
    """Future values of a series: a center and an interval for each."""

    center: Tensor  # the median; of a normal distribution also the mean
    lower: Tensor
    upper: Tensor
    level: float  # probability that a value lies between lower and upper


def normal_score(level: float) -> float:
    """The z with P(-z < Z < z) = level for a standard normal Z; `UserError` outside (0, 1)."""
    require(0 < level < 1, f"level must be in (0, 1), got {level}")
    return NormalDist().inv_cdf(0.5 + level / 2)


def check_horizon(horizon: int) -> None:
    """Raise `UserError` for a horizon that is not at least 1."""
    require(horizon >= 1, f"horizon must be at least 1, got {horizon}")


def finite_forecast(center: Tensor, lower: Tensor, upper: Tensor, level: float) -> Forecast:
    """The forecast, or `UserError` where values of the history were too large to make one."""
    for bound in (center, lower, upper):
        require(
            bool(torch.isfinite(bound).all()),
            "the forecast is not finite: the values of the history are too large for the model, "
            "normalise them as those it was fitted on",
        )
    return Forecast(center, lower, upper, level)


def check_finite(name: str, values: Tensor) -> None:
    """Raise `UserError` naming the first step of values [T, D] that is NaN or infinite."""
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        step, column = bad.nonzero()[0].tolist()
        raise UserError(f"{name} must be finite, got {values[step, column]:g} at step {step}")
