"""The one place where a model's layers are picked: seqkern's, or PyTorch's beside it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from seqkern import nn
from seqkern.errors import require


@dataclass(frozen=True)
class Layers:
    """Constructors with torch's signatures, and functions with torch's, of one backend."""

    LSTM: Callable[..., torch.nn.Module]
    RNN: Callable[..., torch.nn.Module]
    CrossEntropyLoss: Callable[..., torch.nn.Module]
    attention: Callable[..., torch.Tensor]  # q, k, v [B, NH, T, D], is_causal, dropout_p


BACKENDS = {
    "seqkern": Layers(
        # RNN layers and attention are torch's own until their kernels are in the package.
        LSTM=nn.LSTM,
        RNN=torch.nn.RNN,
        CrossEntropyLoss=nn.CrossEntropyLoss,
        attention=torch.nn.functional.scaled_dot_product_attention,
    ),
    "torch": Layers(
        LSTM=torch.nn.LSTM,
        RNN=torch.nn.RNN,
        CrossEntropyLoss=torch.nn.CrossEntropyLoss,
        attention=torch.nn.functional.scaled_dot_product_attention,
    ),
}


def layers(backend: str) -> Layers:
    """The layers of a backend, `seqkern` or `torch`."""
    require(backend in BACKENDS, f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return BACKENDS[backend]
