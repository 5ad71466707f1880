"""Forecasting networks: an LSTM or a causal transformer over the values of a series."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqkern.data.series import WindowBatch
from seqkern.errors import check_tensor, require
from seqkern.models.backends import Layers, layers
from seqkern.models.forecast import (
    Forecast,
    check_finite,
    check_horizon,
    finite_forecast,
    normal_score,
)
from seqkern.models.forecast_heads import DEFAULT_QUANTILES, GaussianHead, Head, QuantileHead
from seqkern.models.gpt import Block, GPTConfig
from seqkern.models.language_model import check_dropout, check_sizes, evaluating
from seqkern.models.padding import check_lengths, valid_steps

NETWORKS = ("lstm", "gpt")
HEADS = ("gaussian", "quantile")


@dataclass(frozen=True)
class ForecasterConfig:
    """Sizes of a `SeriesForecaster`."""

    columns: int = 1  # D, values at a step
    horizon: int = 1  # steps that are forecast at once
    network: str = "lstm"
    head: str = "gaussian"
    context: int = 96  # most steps it is trained to read; the positions of a transformer
    hidden: int = 64
    layers: int = 1
    heads: int = 4  # attention heads of gpt
    dropout: float = 0.0
    quantiles: tuple[float, ...] = DEFAULT_QUANTILES  # of the quantile head

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_sizes(
            columns=self.columns,
            horizon=self.horizon,
            context=self.context,
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
        )
        check_dropout(self.dropout)
        for name, value, choices in (
            ("network", self.network, NETWORKS),
            ("head", self.head, HEADS),
        ):
            require(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}")


class LSTMNetwork(nn.Module):
    """Features [B, T, F] to hidden states [B, T, H]; the state is h and c."""

    def __init__(self, features: int, config: ForecasterConfig, layers: Layers) -> None:
        """Layers of the LSTM, with dropout between them."""
        super().__init__()
        dropout = config.dropout if config.layers > 1 else 0.0
        self.lstm = layers.LSTM(
            features, config.hidden, config.layers, batch_first=True, dropout=dropout
        )

    def forward(self, features: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Read features after a state (None at the start)."""
        hidden, state = self.lstm(features, state)
        return hidden, state

    def repeat(self, state: Any, times: int) -> Any:
        """The state of a batch that holds each row `times` times."""
        return tuple(part.repeat_interleave(times, dim=1) for part in state)  # [layers, B, H]


class TransformerNetwork(nn.Module):
    """Features [B, T, F] to hidden states [B, T, C]; the state is the window of features read.

    Past the context the window slides, and positions count from its start.
    """

    def __init__(self, features: int, config: ForecasterConfig, layers: Layers) -> None:
        """Learned positions and the blocks of `GPT`."""
        super().__init__()
        C = config.hidden
        sizes = GPTConfig(
            vocab_size=1,
            context=config.context,
            hidden=C,
            layers=config.layers,
            heads=config.heads,
            dropout=config.dropout,
        )
        self.context = config.context
        self.embedding = nn.Linear(features, C)
        self.positions = nn.Embedding(config.context, C)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(sizes, layers, n) for n in range(config.layers))
        self.norm = nn.LayerNorm(C)

    def forward(self, features: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read features after a state (None at the start)."""
        new = features.shape[1]
        window = features if state is None else torch.cat([state, features], dim=1)
        window = window[:, -self.context :]
        require(
            new <= self.context,
            f"a transformer reads at most its context of {self.context} steps, got {new}",
        )
        positions = torch.arange(window.shape[1], device=window.device)
        x = self.embedding(window) + self.positions(positions)  # [B, T, C]
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, -new:]), window

    def repeat(self, state: Tensor, times: int) -> Tensor:
        """The state of a batch that holds each row `times` times."""
        return state.repeat_interleave(times, dim=0)


class SeriesForecaster(nn.Module):
    r"""Distributions of the next `horizon` values of a series given those so far.

    At every step t the network reads x_1 .. x_t and gives, for each column and each h from 1 to
    the horizon, a distribution of the change

    .. math:: r_h = \frac{x_{t+h} - x_t}{\sigma \sqrt{h}}

    with :math:`\sigma` the size of the changes from step to step in the training part (`fit_step`):
    outputs of zero are a random walk, so that training starts from the forecast "as the last
    value" whatever the level of the series. The columns of a step are independent given the past.
    Values are expected to be normalised (`seqkern.data.series.Normalizer`).

    Two ways to forecast: `forecast` is direct, all steps at once; `sample` goes step by step, each
    value drawn from the distribution of the next and then read, for any number of steps.

    Args:
        config: the sizes.
        backend: `seqkern` or `torch`, whose layers.

    Example:
        >>> model = SeriesForecaster(ForecasterConfig(horizon=12, hidden=16))
        >>> model.forecast(torch.randn(40, 1)).center.shape
        torch.Size([12, 1])
    """

    step: Tensor
    roots: Tensor

    def __init__(self, config: ForecasterConfig, backend: str = "seqkern") -> None:
        """See the class."""
        super().__init__()
        self.config = config
        D = config.columns
        kind = LSTMNetwork if config.network == "lstm" else TransformerNetwork
        self.network = kind(2 * D, config, layers(backend))
        gaussian = config.head == "gaussian"
        self.head: Head = GaussianHead() if gaussian else QuantileHead(config.quantiles)
        self.dropout = nn.Dropout(config.dropout)
        # The features go past the network as well: linear dependence needs no hidden units.
        self.output = nn.Linear(config.hidden + 2 * D, config.horizon * D * self.head.size)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.register_buffer("step", torch.ones(D))  # [D]
        steps = torch.arange(1.0, config.horizon + 1)
        self.register_buffer("roots", steps.sqrt(), persistent=False)  # [horizon]

    @torch.no_grad()
    def fit_step(self, values: Sequence[Tensor]) -> None:
        """Set the size of a change from step to step, a buffer, from training parts [T, D]."""
        changes = torch.cat([one.diff(dim=0) for one in values])
        require(len(changes) >= 1, "the training part must have at least 2 steps")
        self.step.copy_(changes.double().square().mean(0).sqrt().clamp(min=1e-6))

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Read x [B, T, D] after a state (None at the start).

        Returns:
            outputs [B, T, horizon, D, P], the head's parameters of r_h, and the new state.
        """
        B, T, D = x.shape
        read, before = (None, x[:, :1]) if state is None else state
        change = torch.cat([before, x], dim=1).diff(dim=1) / self.step
        features = torch.cat([x, change], dim=2)  # [B, T, 2 D]
        hidden, read = self.network(features, read)
        outputs = self.output(torch.cat([self.dropout(hidden), features], dim=2))
        return outputs.view(B, T, self.config.horizon, D, self.head.size), (read, x[:, -1:])

    def loss(self, batch: WindowBatch, future_only: bool = False) -> Tensor:
        """The mean of the head's loss over the horizon after every position of every window: [].

        With `future_only` after the last position of each window alone.
        """
        inputs = batch.inputs.to(self.step.dtype)
        outputs, _ = self(inputs)
        scale = self.roots[:, None] * self.step  # [horizon, D]
        r = (batch.targets.to(self.step.dtype) - inputs[:, :, None]) / scale  # [B, L, horizon, D]
        terms = self.head.loss(outputs, r).mean((2, 3))  # [B, L]
        within = batch.within
        if future_only:
            within = within & (within.cumsum(1) == batch.lengths[:, None])
        return terms.where(within, 0).sum() / within.sum()

    def log_prob(self, sequences: Tensor, lengths: Tensor | None = None) -> Tensor:
        r"""Log-density of each sequence given its first value, by the chain rule, dropout off.

        .. math:: \log p(x_2, .., x_n | x_1) = \sum_{t=2}^{n} \log p(x_t | x_1, .., x_{t-1})

        The first value is conditioned on and not counted, as in `LanguageModel.log_prob`. The
        density is that of the values as they are given here, normalised or not.

        Args:
            sequences: [B, T, D]; for a transformer T is at most the context + 1.
            lengths: int64 or int32 [B], each from 1 to T: how many values of a row count.

        Returns:
            [B] in nats, differentiable.

        Raises:
            UserError: another shape or range.
        """
        x = self._checked("sequences", sequences)
        B, T, _ = x.shape
        within = valid_steps(check_lengths(lengths, x), T)
        x = x.masked_fill(~within[..., None], 0)
        if T == 1:
            return x.new_zeros(B)
        with evaluating(self):
            outputs, _ = self(x[:, :-1])
        r = x.diff(dim=1) / self.step  # [B, T - 1, D]
        terms = (self.head.log_prob(outputs[:, :, 0], r) - self.step.log()).sum(2)
        total: Tensor = terms.where(within[:, 1:], 0).sum(1)
        return total

    @torch.no_grad()
    def forecast(
        self, history: Tensor, level: float = 0.95, lengths: Tensor | None = None
    ) -> Forecast:
        """The next `config.horizon` values, each from its own output: directly.

        Args:
            history: [B, T, D] or [T, D]. The last `config.context` steps are read.
            level: probability of the interval, in (0, 1).
            lengths: int64 or int32 [B], the steps of each row; not together with a T above the
                context.

        Returns:
            [B, horizon, D] or [horizon, D]; the center is the median.

        Raises:
            UserError: another shape, values that are not finite, or an option out of range.
        """
        z = normal_score(level)
        x = self._history(history, lengths)
        B = len(x)
        last = torch.full((B,), x.shape[1], device=x.device) if lengths is None else lengths
        rows = torch.arange(B, device=x.device)
        with evaluating(self):
            outputs = self(x)[0][rows, last.long() - 1]  # [B, horizon, D, P]
        anchor = x[rows, last.long() - 1][:, None]  # [B, 1, D]
        scale = self.roots[:, None] * self.step  # [horizon, D]
        bounds = (
            anchor + scale * self.head.value(outputs, torch.full_like(outputs[..., 0], score))
            for score in (0.0, -z, z)
        )
        center, lower, upper = (bound if history.dim() == 3 else bound[0] for bound in bounds)
        return finite_forecast(center, lower, upper, level)

    @torch.no_grad()
    def sample(self, history: Tensor, horizon: int, paths: int = 100, seed: int = 0) -> Tensor:
        """Futures drawn step by step from the distribution of the next value.

        Args:
            history: [B, T, D] or [T, D]. The last `config.context` steps are read.
            horizon: steps to draw, any number; an LSTM carries its state on, a transformer's
                window slides.
            paths: futures of each row.
            seed: the same seed draws the same futures on the same device.

        Returns:
            [B, paths, horizon, D] or [paths, horizon, D].

        Raises:
            UserError: as `forecast`.
        """
        check_horizon(horizon)
        check_sizes(paths=paths)
        x = self._history(history, None)
        generator = torch.Generator(device=x.device).manual_seed(seed)
        drawn = []
        with evaluating(self):
            outputs, (read, last) = self(x)  # once for all paths
            outputs = outputs[:, -1:].repeat_interleave(paths, dim=0)  # [B * paths, 1, ..]
            x = last.repeat_interleave(paths, dim=0)  # [B * paths, 1, D]
            state = (self.network.repeat(read, paths), x)
            for h in range(horizon):
                if h > 0:
                    outputs, state = self(x, state)
                z = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                x = x + self.step * self.head.value(outputs[:, :, 0], z)
                drawn.append(x)
        futures = torch.cat(drawn, dim=1).view(-1, paths, horizon, self.config.columns)
        return futures if history.dim() == 3 else futures[0]

    def forecast_sampled(
        self,
        history: Tensor,
        horizon: int,
        level: float = 0.95,
        paths: int = 200,
        seed: int = 0,
    ) -> Forecast:
        """A forecast from the quantiles of `paths` sampled futures, for any horizon.

        Arguments and errors are those of `forecast` and `sample`.
        """
        normal_score(level)
        drawn = self.sample(history, horizon, paths, seed)
        futures = drawn.to(torch.promote_types(drawn.dtype, torch.float32))
        tail = (1 - level) / 2
        at = torch.tensor([0.5, tail, 1 - tail], dtype=futures.dtype, device=futures.device)
        center, lower, upper = futures.quantile(at, dim=-3).to(drawn.dtype)
        return finite_forecast(center, lower, upper, level)

    def _checked(self, name: str, x: Tensor) -> Tensor:
        D = self.config.columns
        check_tensor(name, x)
        require(
            x.dim() == 3 and x.shape[1] >= 1 and x.shape[2] == D,
            f"{name} must be [B, T, {D}] with T at least 1, got {list(x.shape)}",
        )
        return x.to(self.step.dtype)

    def _history(self, history: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, <= context, D], padding zero."""
        check_tensor("history", history)
        x = self._checked("history", history[None] if history.dim() == 2 else history)
        if lengths is None:
            check_finite("history", x.flatten(0, 1))
            return x[:, -self.config.context :]
        T = x.shape[1]
        lengths = check_lengths(lengths, x)
        require(
            self.config.context >= T,
            f"history with lengths must be at most the context of {self.config.context} long, "
            f"got {T}",
        )
        x = x.masked_fill(~valid_steps(lengths, T)[..., None], 0)
        check_finite("history", x.flatten(0, 1))
        return x
