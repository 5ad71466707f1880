"""Generation token by token: the exact definition of sampling, and the loop around it.

The next token x of a row with logits z [V] is drawn so:

1. p = softmax(z / temperature). At temperature 0 x is the largest logit, and nothing is drawn.
2. top-k: only the k most probable tokens stay (0: all); p is renormalised.
3. top-p: tokens in the order of falling p stay as long as the sum before them is below top_p
   (the first always stays); p is renormalised.
4. min-p: tokens with p >= min_p * max(p) stay; p is renormalised.
5. u is uniform on [0, 1), and x is the first token id whose cumulative p exceeds u.

Equal probabilities rank by lower id everywhere. All of it in float64, with u from one
`torch.Generator` on the CPU: the same seed draws the same numbers on every device.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from seqkern.errors import require


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the fields are those of the module's definition.

    Raises:
        UserError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges; NaN is in none."""
        t = self.temperature
        require(t >= 0 and math.isfinite(t), f"temperature must be at least 0 and finite, got {t}")
        require(self.top_k >= 0, f"top_k must be at least 0 (0: all tokens), got {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        require(0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}")


def token_distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution the next token is drawn from, steps 1 to 4 of the module's definition.

    Args:
        logits: [B, V], any floating dtype; -inf bans a token.
        sampling: the options; temperature 0 gives a one-hot row.

    Returns:
        float64 [B, V], each row summing to 1.

    Raises:
        UserError: a row has NaN, or nothing but -inf.

    Example:
        >>> token_distribution(torch.tensor([[0.0, 1.0, 2.0]]), Sampling(top_k=1)).tolist()
        [[0.0, 0.0, 1.0]]
    """
    require(logits.dim() == 2, f"logits must be [B, V], got {list(logits.shape)}")
    z = logits.double()
    if sampling.temperature == 0:
        require(not bool(z.isnan().any()), "logits must not be NaN")
        # argmax leaves ties to the kernel: the first of equal maxima is found by a stable sort.
        best = z.sort(dim=-1, descending=True, stable=True).indices[:, :1]  # [B, 1]
        return torch.zeros_like(z).scatter_(1, best, 1.0)
    z = z - z.amax(dim=-1, keepdim=True)  # small temperatures must not overflow
    p = torch.softmax(z / sampling.temperature, dim=-1)
    require(not bool(p.isnan().any()), "logits must have a finite maximum and no NaN in each row")
    # In rank order: stable, so that equal probabilities keep the order of their ids.
    ranked, order = p.sort(dim=-1, descending=True, stable=True)
    if 0 < sampling.top_k < p.shape[-1]:
        ranked[:, sampling.top_k :] = 0
        ranked /= ranked.sum(dim=-1, keepdim=True)
    if sampling.top_p < 1:
        before = ranked.cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0  # the first always stays
        ranked[before >= sampling.top_p] = 0
        ranked /= ranked.sum(dim=-1, keepdim=True)
    if sampling.min_p > 0:
        ranked[ranked < sampling.min_p * ranked[:, :1]] = 0
        ranked /= ranked.sum(dim=-1, keepdim=True)
    return torch.zeros_like(p).scatter_(1, order, ranked)


def draw_tokens(p: Tensor, u: Tensor) -> Tensor:
    """Step 5: the first id whose cumulative probability exceeds u, row by row.

    Args:
        p: float64 [B, V], rows summing to 1 up to rounding.
        u: float64 [B] in [0, 1).

    Returns:
        int64 [B]; a token of probability 0 is never drawn.

    Example:
        >>> draw_tokens(torch.tensor([[0.25, 0.0, 0.75]]), torch.tensor([0.25])).tolist()
        [2]
    """
    cumulative = p.cumsum(dim=-1)
    token = torch.searchsorted(cumulative, u[:, None], right=True)  # [B, 1]
    # Where rounding leaves the last sum below u: the last token that has any probability.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())  # [B, 1]
    return torch.minimum(token, last).squeeze(1)


class NextToken(Protocol):
    """What generation needs of a model."""

    def next_logits(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read tokens [B, T] after `state` (None at the start): logits [B, V] and the new state."""


@torch.no_grad()
def generate(
    model: NextToken,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int | None = None,
    stop_tokens: Collection[int] | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue each row of a prompt; `LanguageModel.generate` documents the arguments."""
    require(max_new_tokens >= 0, f"max_new_tokens must be at least 0, got {max_new_tokens}")
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    B = prompt.shape[0]
    stops = torch.tensor(sorted(stop_tokens or ()), dtype=torch.int64, device=prompt.device)
    stopped = torch.zeros(B, dtype=torch.bool, device=prompt.device)
    tokens = [prompt.long()]
    state: Any = None
    for _ in range(max_new_tokens):
        logits, state = model.next_logits(tokens[-1], state)  # [B, V]
        # One number per row whatever the options, so that a row's draws do not depend on others.
        u = torch.rand(B, dtype=torch.float64, generator=generator)
        token = draw_tokens(token_distribution(logits, sampling), u.to(logits.device))  # [B]
        if len(stops):
            token = torch.where(stopped, tokens[-1][:, -1], token)
            stopped = stopped | torch.isin(token, stops)
        tokens.append(token[:, None])  # [B, 1]
        if on_token is not None:
            on_token(token)
        if len(stops) and bool(stopped.all()):
            break
    return torch.cat(tokens, dim=1)  # [B, T + new]
