"""The one place where a model's layers are picked: seqkern's, or PyTorch's beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seqkern import nn, ops
from seqkern.errors import require
from seqkern.models.parts import is_plain

OURS = (nn.LSTM, nn.GRU, nn.RNN)  # recurrent modules whose forward takes lengths


def run_recurrent(
    module: torch.nn.Module, x: Tensor, state: Any, lengths: Tensor | None
) -> tuple[Tensor, Any]:
    """Run layers over x [B, T, I] of either backend: hidden [B, T, H], and the last state.

    Where `lengths` [B] (from 1) are given, the state is that after each row's last token.
    """
    if lengths is None or isinstance(module, OURS):
        options = {} if lengths is None else {"lengths": lengths}
        output, state = module(x, state, **options)
        return output, state
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    output, state = module(packed, state)
    return pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])[0], state


@dataclass(frozen=True)
class Layers:
    """Constructors with torch's signatures, and functions with torch's, of one backend."""

    LSTM: Callable[..., torch.nn.Module]
    LengthsLSTM: Callable[..., torch.nn.Module]  # for rows of different lengths
    RNN: Callable[..., torch.nn.Module]
    CrossEntropyLoss: Callable[..., torch.nn.Module]
    LinearCrossEntropyLoss: Callable[..., torch.nn.Module]  # hidden, weight, target, bias
    attention: Callable[..., Tensor]  # causal: q, k, v [B, NH, T, D] and dropout_p
    # Of new tokens, over a cache they join: attention, all blocks, and a linear layer with the norm
    # before it. None: generation reads all tokens anew for each.
    attention_step: Callable[..., Tensor] | None
    decoder_step: Callable[..., Tensor] | None
    linear_step: Callable[..., Tensor] | None


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)


class LogitsLoss(torch.nn.CrossEntropyLoss):
    """`nn.LinearCrossEntropyLoss` as PyTorch has it: by the logits."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Loss of hidden [..., H] under a head of weight [V, H] and bias [V] for target [...]."""
        logits = F.linear(hidden, weight, bias).flatten(0, -2)  # [N, V]
        return super().forward(logits, target.flatten())


def loss_of_head(
    criterion: torch.nn.Module, head: torch.nn.Module, hidden: Tensor, targets: Tensor
) -> Tensor:
    """A backend's `LinearCrossEntropyLoss` for the logits that a head makes of hidden [..., H].

    The logits are stored only where the head is more than a linear layer.
    """
    loss: Tensor
    if is_plain(head, torch.nn.Linear):
        loss = criterion(hidden, head.weight, targets, head.bias)
        return loss
    options: Any = criterion
    cross_entropy = F.cross_entropy if isinstance(criterion, LogitsLoss) else ops.cross_entropy
    loss = cross_entropy(
        head(hidden).flatten(0, -2),
        targets.flatten(),
        ignore_index=options.ignore_index,
        reduction=options.reduction,
    )
    return loss


BACKENDS = {
    "seqkern": Layers(
        LSTM=nn.LSTM,
        LengthsLSTM=nn.LSTM,
        RNN=nn.RNN,
        CrossEntropyLoss=nn.CrossEntropyLoss,
        LinearCrossEntropyLoss=nn.LinearCrossEntropyLoss,
        attention=ops.causal_attention,
        attention_step=ops.attention_step,
        decoder_step=ops.decoder_step,
        linear_step=ops.linear_step,
    ),
    "torch": Layers(
        LSTM=torch.nn.LSTM,
        LengthsLSTM=torch.nn.LSTM,
        RNN=torch.nn.RNN,
        CrossEntropyLoss=torch.nn.CrossEntropyLoss,
        LinearCrossEntropyLoss=LogitsLoss,
        attention=_torch_attention,
        attention_step=None,
        decoder_step=None,
        linear_step=None,
    ),
}


def layers(backend: str) -> Layers:
    """The layers of a backend, `seqkern` or `torch`."""
    require(backend in BACKENDS, f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return BACKENDS[backend]
