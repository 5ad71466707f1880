"""The distribution the next token is drawn from, step by step as docs/math/sample.md defines it."""

from __future__ import annotations

import torch
from torch import Tensor


def token_distribution(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    repetition_penalty: float | Tensor = 1.0,
    presence_penalty: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
    token_counts: Tensor | None = None,
) -> Tensor:
    """Probabilities float64 [B, V] of the next token; options as in `seqkern.ops.sample`."""

    def column(option: float | Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """One value per row, [B, 1] or [1, 1]."""
        return torch.as_tensor(option, dtype=dtype, device=logits.device).reshape(-1, 1)

    V = logits.shape[-1]
    y = logits.double()
    if token_counts is not None:
        seen = token_counts > 0
        penalty = column(repetition_penalty)
        y = torch.where(seen, torch.where(y > 0, y / penalty, y * penalty), y)
        y = y - column(frequency_penalty) * token_counts - column(presence_penalty) * seen
    # Falling scores; stable, so that equal ones keep the order of their ids.
    y, order = y.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(V, device=logits.device)
    t = column(temperature)
    greedy = t == 0
    p = torch.softmax((y - y[:, :1]) / torch.where(greedy, 1.0, t), dim=-1)

    def keep(p: Tensor, kept: Tensor) -> Tensor:
        p = torch.where(kept, p, 0.0)
        return p / p.sum(dim=-1, keepdim=True)

    k = column(top_k, torch.int64)
    p = keep(p, (rank < k) | (k == 0))
    share = column(top_p)
    p = keep(p, (p.cumsum(dim=-1) - p < share) | (share == 1) | (rank == 0))
    p = keep(p, p >= column(min_p) * p[:, :1])
    p = torch.where(greedy, (rank == 0).double(), p)
    return torch.zeros_like(p).scatter_(1, order, p)
