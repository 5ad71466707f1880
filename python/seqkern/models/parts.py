"""Whether a part of a model is as the model made it.

Some kernels do the work of several layers: they read the layers' parameters, and no forward of a
layer runs. Where users put another layer in a place (an adapter, a quantized one), or hook on to
one (a probe, weight_norm), the model must go through its modules.
"""

from typing import Any

import torch
from torch import nn

_of_all: Any = torch.nn.modules.module  # the hooks of all modules


def is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether calling a module does what its class, one of `kinds`, does, and nothing else."""
    own = module.__dict__
    return (
        type(module) in kinds
        and "forward" not in own
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
        and not _of_all._global_forward_hooks
        and not _of_all._global_forward_pre_hooks
        and not _of_all._global_backward_hooks
        and not _of_all._global_backward_pre_hooks
    )


def is_lookup(module: nn.Module) -> bool:
    """Whether an embedding is rows of its weight and nothing else, also for gradients."""
    return (
        is_plain(module, nn.Embedding)
        and module.padding_idx is None
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )
