"""The loss of a language-model head, without its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from seqkern import ops


class LinearCrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` of `F.linear(hidden, weight, bias)`.

    The head's parameters are arguments of the call: they belong to the model, often tied to its
    embedding. Formula, shapes, dtypes and errors: `seqkern.ops.linear_cross_entropy`.

    Args:
        weight: [V] weight per class, a buffer.
        ignore_index: target that adds nothing.
        reduction: "none", "mean" or "sum".
        label_smoothing: in [0, 1].
        z_loss: weight of the squared log-sum-exp.
        softcap: bound of the logits; 0 for none.
        chunk_bytes: memory for logits; None chooses.

    Example:
        >>> criterion = seqkern.nn.LinearCrossEntropyLoss()
        >>> head = torch.nn.Linear(8, 10)
        >>> loss = criterion(torch.randn(4, 8), head.weight, torch.tensor([1, 2, 3, 4]), head.bias)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__(
            weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        self.z_loss = z_loss
        self.softcap = softcap
        self.chunk_bytes = chunk_bytes

    def forward(  # type: ignore[override]
        self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Loss of hidden [..., H] under a head of weight [V, H] and bias [V] for target [...]."""
        loss = ops.linear_cross_entropy(
            hidden,
            weight,
            target,
            bias,
            class_weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            chunk_bytes=self.chunk_bytes,
        )
        assert isinstance(loss, Tensor)
        return loss

    def extra_repr(self) -> str:
        """The options that differ from torch's."""
        given = {"z_loss": self.z_loss, "softcap": self.softcap, "chunk_bytes": self.chunk_bytes}
        return ", ".join(f"{name}={value}" for name, value in given.items() if value)
