"""Linear-cross-entropy in plain PyTorch: the logits, and their cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from seqkern.reference.cross_entropy import cross_entropy


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
    logits = F.linear(hidden, weight, bias)  # [..., V]
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
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    valid = target != ignore_index
    y = torch.where(valid, target, 0).long().unsqueeze(-1)
    logprobs = torch.where(valid, logits.gather(-1, y).squeeze(-1) - lse, 0.0)
    return loss, lse, logprobs
