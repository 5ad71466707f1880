"""How the next token is chosen, around `seqkern.ops.sample`, which defines it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from seqkern import ops
from seqkern.errors import UserError, require
from seqkern.ops._mistakes import describe
from seqkern.reference import token_distribution


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the fields are those of `seqkern.ops.sample`.

    Each is a number, or a tensor [B] with a value per row.

    Raises:
        UserError: a number outside its range.
    """

    temperature: float | Tensor = 1.0
    top_k: int | Tensor = 0
    top_p: float | Tensor = 1.0
    min_p: float | Tensor = 0.0
    repetition_penalty: float | Tensor = 1.0
    presence_penalty: float | Tensor = 0.0
    frequency_penalty: float | Tensor = 0.0

    def __post_init__(self) -> None:
        """Check the ranges of numbers, which NaN is in none of; the op checks tensors."""
        _check(self.temperature, "temperature", "at least 0 and finite", lambda t: t >= 0)
        _check(
            self.top_k,
            "top_k",
            "at least 0 (0: all tokens) and below 2**63",
            lambda k: 0 <= k < 2**63,
            Integral,
        )
        _check(self.top_p, "top_p", "in (0, 1]", lambda p: 0 < p <= 1)
        _check(self.min_p, "min_p", "in [0, 1]", lambda p: 0 <= p <= 1)
        _check(self.repetition_penalty, "repetition_penalty", "above 0 and finite", lambda r: r > 0)
        _check(self.presence_penalty, "presence_penalty", "finite", lambda _: True)
        _check(self.frequency_penalty, "frequency_penalty", "finite", lambda _: True)

    @property
    def penalises(self) -> bool:
        """Whether tokens seen before are scored down (or up)."""
        neutral = (self.repetition_penalty, 1), (self.presence_penalty, 0)
        return any(
            isinstance(given, Tensor) or given != none
            for given, none in (*neutral, (self.frequency_penalty, 0))
        )

    def select(self, rows: Tensor) -> Sampling:
        """The options of some rows."""
        per_row = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value[rows] for name, value in per_row.items()})


def _check(
    value: object, name: str, words: str, valid: Callable[[Any], bool], kind: type = Real
) -> None:
    if isinstance(value, Tensor):
        return
    wanted = "an integer" if kind is Integral else "a number"
    came = describe(value)
    require(isinstance(value, kind), f"{name} must be {wanted} or a tensor, got {came}")
    fits = (kind is Integral or _is_finite(value)) and valid(value)
    require(fits, f"{name} must be {words}, got {came}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int may be larger than any float
        return False


class Sampler:
    """Draws a token per row. Options, seed and counts of a row go with it in any batch.

    Args:
        sampling: the options.
        seeds: int64 [B].
        counts: int32 [B, V] tokens of the prompts where there are penalties; kept up to date.
    """

    #: Where `ops.sample` looks at what it drew, and raises.
    looking_device = "cpu"

    def __init__(self, sampling: Sampling, seeds: Tensor, counts: Tensor | None) -> None:
        """See the class."""
        self.sampling, self.seeds, self.counts = sampling, seeds, counts
        self._numbers = not any(isinstance(v, Tensor) for v in vars(sampling).values())
        self._options = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
        self._looks = seeds.device.type == self.looking_device
        # A row's own seed and the number alone draw the same; the number is quicker to pass.
        self._seed = int(seeds[0]) if len(seeds) == 1 and seeds.device.type == "cpu" else seeds

    def draw(self, logits: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B] for logits [B, V] and their log-probabilities under the model, float32 [B].

        On a GPU a row without a distribution has a token like any other, so that whatever reads it
        stays within its tables, and the log-probability NaN: see `check_drawn`.

        Raises:
            UserError: on the CPU, a row without a distribution: NaN, +inf or only -inf.
        """
        token, logprob = _sample(logits, self._options, self._seed, step, self.counts)
        return (token if self._looks else token.clamp_(min=0)), logprob

    def stream(self, n: int) -> Sampler:
        """The same rows with other random numbers, n from 1; the counts are shared."""
        return Sampler(self.sampling, self.seeds ^ (n << 32), self.counts)

    def distribution(self, logits: Tensor, proposed: Tensor | None = None) -> Tensor:
        """What `draw` draws from: probabilities float64 [B, V] for logits [B, V].

        With proposed [B, S - 1] it is [B, S, V] for logits [B, S, V], place s as if proposed[:, :s]
        came before.
        """
        s = self.sampling
        plain = (s.top_k, s.top_p, s.min_p) == (0, 1, 0) if self._numbers else False
        if plain and not s.penalises and s.temperature != 0:
            return torch.softmax(logits.double() / s.temperature, -1)
        if proposed is None:
            return token_distribution(logits, **self._options, token_counts=self.counts)
        B, S, V = logits.shape
        options = {
            name: value.repeat_interleave(S) if isinstance(value, Tensor) else value
            for name, value in self._options.items()
        }
        counts = None
        if self.counts is not None:
            before = torch.nn.functional.one_hot(proposed, V).cumsum(1).to(self.counts.dtype)
            first = torch.zeros_like(self.counts).unsqueeze(1)
            counts = self.counts.unsqueeze(1) + torch.cat((first, before), 1)  # [B, S, V]
            counts = counts.flatten(0, 1)
        return token_distribution(logits.flatten(0, 1), **options, token_counts=counts).view(
            B, S, V
        )

    def draw_from(self, probabilities: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, S] from probabilities [B, S, V], place s at step steps[b] + s.

        Beside them their log-probabilities [B, S]; no distribution is what it is in `draw`.
        """
        B, S, _ = probabilities.shape
        step = steps.unsqueeze(1) + torch.arange(S, device=steps.device)  # [B, S]
        try:
            token, logprob = ops.sample(
                probabilities.log().float().flatten(0, 1),
                seed=self.seeds.repeat_interleave(S),
                step=step.flatten(),
            )
        except ValueError as error:  # which names a place of a row
            unknown = ~(probabilities.sum(2) > 0)  # NaN too
            if not unknown.any():
                raise UserError(str(error)) from None
            raise _no_distribution(int(unknown.nonzero()[0, 0])) from None
        token = token if self._looks else token.clamp_(min=0)
        return token.view(B, S), logprob.view(B, S)

    def count(self, tokens: Tensor, weights: Tensor | None = None) -> None:
        """Count tokens [B, S] as seen; `weights` [B, S], 0 leaves one out, -1 takes it back."""
        if self.counts is not None:
            if weights is None:
                weights = torch.ones_like(tokens)
            self.counts.scatter_add_(1, tokens, weights.to(self.counts.dtype))

    def select(self, rows: Tensor) -> Sampler:
        """The sampler of some rows."""
        counts = None if self.counts is None else self.counts[rows]
        return Sampler(self.sampling.select(rows), self.seeds[rows], counts)


def check_drawn(logprobs: Tensor, first: int = 0) -> None:
    """Raise the `UserError` that a GPU could not, from log-probabilities of `Sampler.draw`.

    They are [B, n], the first one that of new token `first`, or [B] of whole sequences. This waits
    for the device.
    """
    unknown = logprobs.isnan()
    if unknown.any():
        row, *token = unknown.nonzero()[0].tolist()
        raise _no_distribution(row, "".join(f" for new token {first + n}" for n in token))


def _no_distribution(row: int, place: str = "") -> UserError:
    return UserError(
        "sample: logits must have a finite maximum and no NaN in each row, "
        f"got others in row {row}{place}"
    )


def _sample(
    logits: Tensor,
    options: dict[str, int | float | Tensor],
    seed: int | Tensor,
    step: int | Tensor,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    try:
        return ops.sample(
            logits,
            **options,  # type: ignore[arg-type]
            token_counts=counts,
            seed=seed,
            step=step,
            logprobs="model",
        )
    except ValueError as error:  # NaN: a run that diverged, not a defect
        raise UserError(str(error)) from None


def count_tokens(prompt: Tensor, lengths: Tensor | None, vocab_size: int) -> Tensor:
    """How often each token occurs in each row: int32 [B, V] of prompt [B, T] and lengths [B]."""
    counts = torch.zeros(len(prompt), vocab_size, dtype=torch.int32, device=prompt.device)
    real = torch.ones_like(prompt, dtype=torch.int32)
    if lengths is not None:
        times = torch.arange(prompt.shape[1], device=prompt.device)
        real = (times < lengths.to(prompt.device).unsqueeze(1)).to(torch.int32)  # [B, T]
    return counts.scatter_add_(1, prompt, real)
