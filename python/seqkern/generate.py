"""Generation token by token: the loop around `seqkern.ops.sample`, which defines the sampling."""

import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from seqkern import ops
from seqkern.errors import UserError, require


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the fields are those of `seqkern.ops.sample`.

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


class NextToken(Protocol):
    """What generation needs of a model."""

    def next_logits(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read tokens [B, T] after `state` (None at the start): logits [B, V] and the new state."""


def _draw(logits: Tensor, **options: Any) -> Tensor:
    try:
        return ops.sample(logits, **options)[0]
    except ValueError as error:  # NaN: a run that diverged, not a defect
        raise UserError(str(error)) from None


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
    if seed is None:
        seed = torch.Generator().seed()
    B = prompt.shape[0]
    stops = torch.tensor(sorted(stop_tokens or ()), dtype=torch.int64, device=prompt.device)
    stopped = torch.zeros(B, dtype=torch.bool, device=prompt.device)
    tokens = [prompt.long()]
    options = asdict(sampling)
    state: Any = None
    for step in range(max_new_tokens):
        logits, state = model.next_logits(tokens[-1], state)  # [B, V]
        token = _draw(logits, **options, seed=seed % 2**63, step=step)  # [B]
        if len(stops):
            token = torch.where(stopped, tokens[-1][:, -1], token)
            stopped = stopped | torch.isin(token, stops)
        tokens.append(token[:, None])  # [B, 1]
        if on_token is not None:
            on_token(token)
        if len(stops) and bool(stopped.all()):
            break
    return torch.cat(tokens, dim=1)  # [B, T + new]
