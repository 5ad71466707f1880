"""AdamW over a model's parameters, and its state as named tensors."""

import torch
from torch import Tensor, nn

from seqkern.errors import UserError
from seqkern.parallel import as_share

BETAS = (0.9, 0.99)


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) that decays matrices only.

    Biases and normalisation gains are scales and offsets: pulling them to zero regularises
    nothing.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, named `<parameter>/<state>`; empty before the first update."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    saved = optimizer.state_dict()
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(ordered):
        prefix = f"{names[parameter]}/"
        state = {
            key.removeprefix(prefix): as_share(value, parameter)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        if state:
            saved["state"][index] = state
    if tensors and len(saved["state"]) != len(ordered):
        raise UserError("the checkpoint is damaged: its optimizer state is of another model")
    optimizer.load_state_dict(saved)
