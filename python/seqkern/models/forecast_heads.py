"""Distributions of a future value, as a network's outputs parametrise them.

Both are functions of a normal score z: the value at probability Phi(z). Outputs of zero stand for
the standard normal, or for the piecewise linear distribution closest to it.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.errors import require

DEFAULT_QUANTILES = (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975)
_LEAST = 1e-3  # of a width: the density stays finite
_ONE = math.log(math.exp(1 - _LEAST) - 1)  # softplus of it is 1 - _LEAST


class Head(nn.Module, ABC):
    """A distribution with `size` parameters, in the last dimension of `outputs`."""

    size: int

    @abstractmethod
    def value(self, outputs: Tensor, z: Tensor) -> Tensor:
        """The value at probability Phi(z): outputs [..., P] and z [...] to [...]."""

    @abstractmethod
    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """Log-density at x: outputs [..., P] and x [...] to [...]."""

    @abstractmethod
    def loss(self, outputs: Tensor, x: Tensor) -> Tensor:
        """What training minimises: outputs [..., P] and x [...] to [...]."""


class GaussianHead(Head):
    """N(m, s^2), trained by its log-likelihood; outputs are m and the s that softplus makes."""

    size = 2

    def value(self, outputs: Tensor, z: Tensor) -> Tensor:
        """The value m + s z."""
        return outputs[..., 0] + _width(outputs[..., 1]) * z

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """-log s - ((x - m) / s)^2 / 2 - log(2 pi) / 2."""
        s = _width(outputs[..., 1])
        return _normal_log_density((x - outputs[..., 0]) / s) - s.log()

    def loss(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The negative log-density."""
        return -self.log_prob(outputs, x)


class QuantileHead(Head):
    r"""Quantiles at given probabilities, which never cross, trained by the pinball loss.

    The outputs are the middle quantile and the widths between neighbours. Between and beyond the
    quantiles the value is linear in the normal score, so that tails are normal and the density
    is that of a normal whose width changes from piece to piece.

    Args:
        probabilities: increasing, in (0, 1); at least 2.

    Source of the loss: Koenker and Bassett 1978.
    """

    scores: Tensor
    probabilities: Tensor

    def __init__(self, probabilities: Sequence[float]) -> None:
        """See the class."""
        super().__init__()
        p = [0.0, *probabilities, 1.0]
        require(
            len(p) >= 4 and all(a < b for a, b in itertools.pairwise(p)),
            f"quantiles must be at least 2 increasing numbers in (0, 1), got {list(probabilities)}",
        )
        self.size = len(p) - 2
        scores = [NormalDist().inv_cdf(one) for one in probabilities]
        self.register_buffer("scores", torch.tensor(scores), persistent=False)
        self.register_buffer("probabilities", torch.tensor(list(probabilities)), persistent=False)

    def quantiles(self, outputs: Tensor) -> Tensor:
        """[..., Q], increasing."""
        widths = _width(outputs[..., 1:]) * self.scores.diff()  # [..., Q - 1]
        above = F.pad(widths.cumsum(-1), (1, 0))  # [..., Q], from the lowest
        middle = self.size // 2
        start = outputs[..., :1] + self.scores[middle]
        return start + above - above[..., middle : middle + 1]

    def value(self, outputs: Tensor, z: Tensor) -> Tensor:
        """On the line through the two quantiles whose scores are around z."""
        q = self.quantiles(outputs)
        piece = (z[..., None] >= self.scores[1:-1]).sum(-1, keepdim=True)  # [..., 1]
        left, right = q.gather(-1, piece), q.gather(-1, piece + 1)
        start, width = self.scores[piece], self.scores.diff()[piece]
        return (left + (right - left) * (z[..., None] - start) / width)[..., 0]

    def log_prob(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The normal log-density of x's score, less the log of the piece's slope."""
        q = self.quantiles(outputs)
        piece = (x[..., None] >= q[..., 1:-1]).sum(-1, keepdim=True)  # [..., 1]
        left = q.gather(-1, piece)
        slope = (q.gather(-1, piece + 1) - left) / self.scores.diff()[piece]
        z = self.scores[piece] + (x[..., None] - left) / slope
        return (_normal_log_density(z) - slope.log())[..., 0]

    def loss(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The mean over the quantiles q_k of max(p_k (x - q_k), (p_k - 1) (x - q_k))."""
        error = x[..., None] - self.quantiles(outputs)
        p = self.probabilities
        return torch.maximum(p * error, (p - 1) * error).mean(-1)


def _width(output: Tensor) -> Tensor:
    """Positive, 1 for an output of 0."""
    return F.softplus(output + _ONE) + _LEAST


def _normal_log_density(z: Tensor) -> Tensor:
    return -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
