"""Linear-cross-entropy in plain PyTorch: the logits, and their cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from seqkern.reference.cross_entropy import capped, cross_entropy, without_ignored


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log-sum-exp and log-probability of the target (0 where it is ignored)."""
    # Ignored rows have a log-sum-exp of their own, but no part in the rest: see without_ignored.
    every_lse = torch.logsumexp(capped(F.linear(hidden, weight, bias), softcap), -1)
    logits = F.linear(without_ignored(hidden, target, ignore_index), weight, bias)  # [..., V]
    loss, lse = cross_entropy(
        logits,
        target,
        class_weight,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss,
        softcap,
    )
    valid = target != ignore_index
    y = torch.where(valid, target, 0).long().unsqueeze(-1)
    chosen = capped(logits, softcap).gather(-1, y).squeeze(-1)
    return loss, every_lse, torch.where(valid, chosen - lse, 0.0)
