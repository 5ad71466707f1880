"""`torch.nn.CrossEntropyLoss` on seqkern's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from seqkern import ops
from seqkern.nn._tools import StandsForTorchs, taken_whole


class CrossEntropyLoss(StandsForTorchs, torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` with z-loss and soft-capping; same arguments, same state_dict.

    Formula, shapes, dtypes and errors: `seqkern.ops.cross_entropy`.

    Args:
        weight: [V] weight per class, a buffer.
        size_average, reduce: torch's deprecated spellings of `reduction`.
        ignore_index: target that adds nothing.
        reduction: "none", "mean" or "sum".
        label_smoothing: in [0, 1].
        z_loss: weight of the squared log-sum-exp.
        softcap: bound of the logits; 0 for none.

    Example:
        >>> criterion = seqkern.nn.CrossEntropyLoss(z_loss=1e-4)
        >>> loss = criterion(torch.randn(4, 10), torch.tensor([1, 2, 3, 4]))
    """

    # On the class, for instances of torch's that `seqkern.patch` has made ours.
    z_loss: float = 0.0
    softcap: float = 0.0

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float = 0.0,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap

    @taken_whole
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of logits `input` [B, V, ...] (or [V]) for `target`."""
        has_options = self.z_loss or self.softcap
        # Logits in parts on several devices (DTensor) are torch's to bring together.
        if type(input).__module__.startswith("torch.distributed") and not has_options:
            return super().forward(input, target)
        return ops.cross_entropy(
            input,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
        )

    def extra_repr(self) -> str:
        """The options that differ from torch's."""
        given = {"z_loss": self.z_loss, "softcap": self.softcap}
        return ", ".join(f"{name}={value}" for name, value in given.items() if value)
