"""Rows to sample from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

V = 12


def logits_of(rows: int, vocabulary: int = V, spread: float = 1.5) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(7)) * spread


def counts_of(rows: int, vocabulary: int = V) -> Tensor:
    rng = torch.Generator().manual_seed(8)
    return torch.randint(0, 4, (rows, vocabulary), dtype=torch.int32, generator=rng)


def penalised(options: dict[str, Any]) -> bool:
    return any(name.endswith("penalty") for name in options)
