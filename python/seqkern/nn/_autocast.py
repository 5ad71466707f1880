"""What torch's recurrent modules return under autocast on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def as_torchs_state(result: Tensor, before: Tensor) -> Tensor:
    """A new state, or a GRU's output, in torch's dtype, given the state `before` (or, where that is
    made of it, the input).

    On the CPU autocast casts what is multiplied, but not the state that torch's GRU and LSTMCell
    carry along: from float32 it stays float32.
    """
    if before.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return result
    return result.to(torch.promote_types(before.dtype, torch.get_autocast_dtype("cpu")))
