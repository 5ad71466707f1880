"""Which modules of torch's have a counterpart of ours."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seqkern import nn
from seqkern.nn._dynamo import allow_recurrent_modules


@dataclass(frozen=True)
class Kind:
    """A module class of torch's and ours.

    Ours is a subclass that differs in methods alone, so that an instance of one becomes an instance
    of the other by its `__class__`, and everything that refers to it stays as it is.
    """

    name: str
    recurrent: bool = True

    @property
    def torchs(self) -> type[torch.nn.Module]:
        """Torch's class."""
        found: type[torch.nn.Module] = getattr(torch.nn, self.name)
        return found

    @property
    def ours(self) -> type[torch.nn.Module] | None:
        """Our class; None as long as there is no kernel for it."""
        return getattr(nn, self.name, None)

    def become(self, module: torch.nn.Module, other: type[torch.nn.Module]) -> None:
        """Make `module` an instance of `other`, one of the two classes."""
        module.__class__ = other
        if self.recurrent:
            allow_recurrent_modules()


KINDS = {
    kind.name: kind
    for kind in (
        Kind("LSTM"),
        Kind("LSTMCell"),
        Kind("GRU"),
        Kind("GRUCell"),
        Kind("RNN"),
        Kind("RNNCell"),
        Kind("CrossEntropyLoss", recurrent=False),
    )
}
