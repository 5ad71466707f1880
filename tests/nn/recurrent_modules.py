"""What the tests of the recurrent modules share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recurrent import run


def gradients(module: Any, call: Any, *tensors: Tensor) -> list[Tensor]:
    """Outputs, then gradients of the tensors and of the parameters."""
    names = [name for name, _ in module.named_parameters()]

    def function(*given: Tensor) -> Any:
        parameters = dict(zip(names, given[len(tensors) :], strict=True))
        return torch.func.functional_call(module, parameters, given[: len(tensors)])

    if call is not None:
        return run(call, tensors)
    return run(lambda *t: flat(function(*t)), [*tensors, *module.parameters()])


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected)


class Unpacked(torch.nn.Module):
    """A module as a function of (input, h, c)."""

    def __init__(self, module: Any, call: Any) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, *tensors: Tensor) -> Any:
        return self.call(self.module, *tensors)
