"""Softmax-cross-entropy in plain PyTorch, class dimension last."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of `logits` [..., V] as `seqkern.ops.cross_entropy` defines them.

    `target` holds classes [...] or, when floating point, class probabilities [..., V].
    """
    every_lse = torch.logsumexp(capped(logits, softcap), -1)
    logits = capped(without_ignored(logits, target, ignore_index), softcap)
    V = logits.shape[-1]
    lse = torch.logsumexp(logits, -1)
    nll = lse.unsqueeze(-1) - logits  # [..., V], -log p
    w = torch.ones(V, dtype=logits.dtype, device=logits.device) if weight is None else weight
    w = w.to(logits.dtype)
    if target.is_floating_point():
        q = (1 - label_smoothing) * target.to(logits.dtype) + label_smoothing / V
        valid = torch.ones_like(lse, dtype=torch.bool)
        row_weight = torch.ones_like(lse)
        ce = (w * q * nll).sum(-1)
    else:
        valid = target != ignore_index
        y = torch.where(valid, target, 0).long()
        row_weight = w[y] * valid
        ce = (1 - label_smoothing) * row_weight * nll.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        if label_smoothing > 0:
            ce = ce + label_smoothing / V * (w * nll).sum(-1) * valid
    ce = torch.where(valid, ce, 0.0)
    z = torch.where(valid, z_loss * lse**2, 0.0)
    if reduction == "none":
        return ce + z, every_lse
    if reduction == "sum":
        return ce.sum() + z.sum(), every_lse
    loss = ce.sum() / row_weight.sum()
    return (loss + z.sum() / valid.sum() if z_loss else loss), every_lse


def capped(logits: Tensor, softcap: float) -> Tensor:
    """The logits within the bound `softcap`; 0 for none."""
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


def without_ignored(rows: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """`rows` [..., n], with 0 where a target class [...] is to be ignored.

    Before the loss is computed: what such a row holds may be NaN, and a gradient of zero times NaN
    is NaN.
    """
    if target.is_floating_point():
        return rows
    return rows.masked_fill((target == ignore_index).unsqueeze(-1), 0.0)
