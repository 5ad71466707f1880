"""The classical autoregressive model, univariate (AR) and multivariate (VAR)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from seqkern.data.series.windows import check_scale
from seqkern.errors import check_tensor, require
from seqkern.models.forecast import (
    Forecast,
    check_finite,
    check_horizon,
    finite_forecast,
    normal_score,
)
from seqkern.models.language_model import check_sizes
from seqkern.models.padding import check_lengths, valid_steps


class AutoregressiveModel(nn.Module):
    r"""A value is a linear function of its own p past values, plus noise.

    .. math:: x_t = c + \sum_{j=1}^{p} A_j x_{t-j} + e_t, \qquad e_t \sim N(0, \Sigma)

    `fit` finds c and the A_j by least squares given the first p values, which is maximum
    likelihood, and the covariance of the residuals by maximum likelihood (divided by their number,
    as `statsmodels`' `AutoReg` does; its `VAR` divides by the degrees of freedom). All of it is
    float64. Source: Luetkepohl 2005, sections 2.1, 2.2 and 3.2.

    Args:
        order: p, at least 1.
        columns: D, the values at a step.

    Attributes:
        intercept: c, [D].
        coefficients: A_1 .. A_p, [p, D, D]; row d makes column d.
        covariance: of the residuals, [D, D].

    Example:
        >>> series = torch.sin(torch.arange(60.0)) + 0.1 * torch.randn(60)
        >>> model = AutoregressiveModel(order=2).fit(series)
        >>> model.forecast(series, horizon=12, level=0.9).upper.shape
        torch.Size([12])
    """

    intercept: Tensor
    coefficients: Tensor
    covariance: Tensor

    def __init__(self, order: int, columns: int = 1) -> None:
        """See the class."""
        super().__init__()
        check_sizes(order=order, columns=columns)
        self.order, self.columns = order, columns
        D, exact = columns, torch.float64
        self.register_buffer("intercept", torch.zeros(D, dtype=exact))
        self.register_buffer("coefficients", torch.zeros(order, D, D, dtype=exact))
        self.register_buffer("covariance", torch.eye(D, dtype=exact))

    def fit(self, series: Tensor | Sequence[Tensor]) -> "AutoregressiveModel":
        """Estimate the parameters, in place.

        Args:
            series: [T, D], or [T] where D is 1; several of any lengths are fitted together.

        Returns:
            The model.

        Raises:
            UserError: values that are not finite, a column that is constant, or too few steps.
        """
        if not isinstance(series, (Tensor, list, tuple)):
            check_tensor("series", series)
        several = [series] if isinstance(series, Tensor) else list(series)
        parts = [self._steps("series", one).double().cpu() for one in several]
        for part in parts:
            check_finite("series", part)
        p, D = self.order, self.columns
        targets = torch.cat([part[p:] for part in parts])  # [n, D]
        needed = p * D + 2
        require(
            len(targets) >= needed,
            f"series is too short: order {p} with {D} columns needs {needed} steps after the "
            f"first {p}, got {len(targets)}",
        )
        every = torch.cat(parts)
        mean, scale = every.mean(0), every.std(0)
        for d in range(D):
            require(bool((every[:, d] != every[0, d]).any()), f"column {d} of series is constant")
            check_scale(f"column {d} of series", every[:, d], scale[d])
        # Standardised, so that columns of different sizes are conditioned alike.
        lags = [lagged((part - mean) / scale, p) for part in parts]
        ones = torch.ones(len(targets), 1, dtype=torch.float64)
        design = torch.cat([ones, torch.cat(lags)], dim=1)  # [n, 1 + p D]
        solved = torch.linalg.lstsq(design, (targets - mean) / scale, driver="gelsd").solution
        residuals = targets - mean - scale * (design @ solved)  # [n, D]
        rows = solved[1:].view(p, D, D).transpose(1, 2)  # [p, D, D], of standardised values
        A = rows * scale[:, None] / scale
        self.coefficients.copy_(A)
        self.intercept.copy_(mean + scale * solved[0] - (A @ mean).sum(0))
        self.covariance.copy_(residuals.T @ residuals / len(residuals))
        return self

    def moving_average(self, horizon: int) -> Tensor:
        r"""The MA representation: what a shock at step t adds to x at t, t + 1, ..

        .. math:: \Psi_0 = I, \qquad \Psi_h = \sum_{j=1}^{\min(h, p)} \Psi_{h-j} A_j

        Returns:
            :math:`\Psi_0 .. \Psi_{horizon-1}`, [horizon, D, D].
        """
        check_horizon(horizon)
        psi = [torch.eye(self.columns, dtype=torch.float64, device=self.covariance.device)]
        for h in range(1, horizon):
            terms = [
                psi[h - j] @ self.coefficients[j - 1] for j in range(1, min(h, self.order) + 1)
            ]
            psi.append(torch.stack(terms).sum(0))
        return torch.stack(psi)

    def forecast(self, history: Tensor, horizon: int, level: float = 0.95) -> Forecast:
        r"""The mean of the next values given a history, and intervals around it.

        The error of the forecast h steps ahead has covariance
        :math:`\sum_{i<h} \Psi_i \Sigma \Psi_i^T`; that of the estimated parameters is left out.

        Args:
            history: [T, D], [T] where D is 1, or [B, T, D]; T at least the order.
            horizon: steps to forecast.
            level: probability of the interval, in (0, 1).

        Returns:
            float64 in the shape of the history, with `horizon` in place of T.

        Raises:
            UserError: a model that was not fitted, a history that is too short, not finite or too
                large, or an option out of range.
        """
        z = normal_score(level)
        check_horizon(horizon)
        check_tensor("history", history)
        batched = history if history.dim() == 3 else self._steps("history", history)[None]
        require(
            batched.shape[2] == self.columns,
            f"history must have {self.columns} columns, got {list(history.shape)}",
        )
        require(
            batched.shape[1] >= self.order,
            f"history must have at least order = {self.order} steps, got {batched.shape[1]}",
        )
        check_finite("history", batched.flatten(0, 1))
        self._check_fitted()
        past = list(batched[:, -self.order :].double().unbind(1))  # each [B, D]
        for _ in range(horizon):
            lags = torch.stack(past[: -self.order - 1 : -1])  # [p, B, D], the latest first
            moved = lags @ self.coefficients.transpose(1, 2)  # [p, B, D]
            past.append(self.intercept + moved.sum(0))
        psi = self.moving_average(horizon)
        spread = (psi @ self.covariance @ psi.transpose(1, 2)).cumsum(0)  # [horizon, D, D]
        center = torch.stack(past[self.order :], dim=1)  # [B, horizon, D]
        reach = z * spread.diagonal(dim1=1, dim2=2).sqrt()  # [horizon, D]
        if history.dim() < 3:
            center = center[0]  # [horizon, D]
        if history.dim() == 1:
            center, reach = center[:, 0], reach[:, 0]
        return finite_forecast(center, center - reach, center + reach, level)

    def log_prob(self, sequences: Tensor, lengths: Tensor | None = None) -> Tensor:
        r"""Log-density of each sequence given its first p values, by the chain rule.

        .. math:: \sum_{t=p+1}^{n} \log N(x_t; \; c + \sum_j A_j x_{t-j}, \; \Sigma)

        The first p values are conditioned on and not counted. A sequence no longer than that has
        log-density 0.

        Args:
            sequences: [B, T, D], or [B, T] where D is 1.
            lengths: int64 or int32 [B], each from 1 to T: how many values of a row count.

        Returns:
            [B] float64, in nats.

        Raises:
            UserError: a model that was not fitted, another shape or range, or a covariance that is
                singular.
        """
        check_tensor("sequences", sequences)
        x = sequences[..., None] if sequences.dim() == 2 and self.columns == 1 else sequences
        require(
            x.dim() == 3 and x.shape[2] == self.columns and x.shape[1] >= 1,
            f"sequences must be [B, T, {self.columns}] with T at least 1, got "
            f"{list(sequences.shape)}",
        )
        B, T, D = x.shape
        within = valid_steps(check_lengths(lengths, x), T)
        self._check_fitted()
        x = x.double().masked_fill(~within[..., None], 0)
        if self.order >= T:
            return x.new_zeros(B)
        factor, failed = torch.linalg.cholesky_ex(self.covariance)
        # The part of each column's variance that the columns before it leave unexplained.
        own = factor.diagonal().square() / self.covariance.diagonal()
        require(
            int(failed) == 0 and bool((own > 1e-12).all()),
            "the covariance of the residuals is singular: there is no density",
        )
        predicted = self.intercept.expand(B, T - self.order, D)
        for j in range(1, self.order + 1):
            predicted = predicted + x[:, self.order - j : T - j] @ self.coefficients[j - 1].T
        errors = (x[:, self.order :] - predicted).transpose(1, 2)  # [B, D, T - p]
        white = torch.linalg.solve_triangular(factor, errors, upper=False)
        constant = 0.5 * D * math.log(2 * math.pi) + factor.diagonal().log().sum()
        terms = -constant - 0.5 * white.square().sum(1)  # [B, T - p]
        total: Tensor = terms.where(within[:, self.order :], 0).sum(1)
        return total

    def _check_fitted(self) -> None:
        """Raise `UserError` where the parameters are still those of the constructor."""
        buffers = (self.intercept, self.coefficients, self.covariance)
        # Whoever wrote to them, by load_state_dict or by hand, counts a version; a copy does not.
        fitted = any(b._version > 0 for b in buffers)
        fitted = fitted or any(bool(b.any()) for b in buffers[:2])
        require(
            fitted or not torch.equal(self.covariance, torch.eye(self.columns).to(self.covariance)),
            "the model has no parameters yet: call fit, or load_state_dict, first",
        )

    def _steps(self, name: str, series: Tensor) -> Tensor:
        """[T] as [T, 1], and [T, D] as it is."""
        check_tensor(name, series)
        x = series[:, None] if series.dim() == 1 and self.columns == 1 else series
        require(
            x.dim() == 2 and x.shape[1] == self.columns,
            f"{name} must be [T, {self.columns}]{' or [T]' if self.columns == 1 else ''}, "
            f"got {list(series.shape)}",
        )
        return x


def lagged(x: Tensor, p: int) -> Tensor:
    """[T, D] to [T - p, p D]: beside each step from the p-th on, the p before, latest first."""
    T = len(x)
    return torch.cat([x[p - j : max(T - j, p - j)] for j in range(1, p + 1)], dim=1)
