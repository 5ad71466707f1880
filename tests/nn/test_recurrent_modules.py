"""The recurrent modules are torch's: classes, state_dicts, and PyTorch's own test inputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from recurrent_modules import assert_same, flat
from torch.testing._internal.common_modules import module_db

import seqkern

NAMES = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]
OURS: dict[str, Any] = {name: getattr(seqkern.nn, name) for name in NAMES}
THEIRS: dict[str, Any] = {name: getattr(torch.nn, name) for name in NAMES}


@pytest.mark.parametrize("name", OURS)
def test_is_torchs(backend: Any, name: str) -> None:
    ours, theirs = OURS[name](5, 7), THEIRS[name](5, 7)
    assert isinstance(ours, THEIRS[name])
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)


def torchs_inputs() -> list[Any]:
    """(name, description, constructor input, forward input) of PyTorch's own module tests."""
    found = []
    for info in module_db:
        name = info.module_cls.__name__
        if info.module_cls not in THEIRS.values():
            continue
        for training in (False, True):
            torch.manual_seed(0)
            inputs = info.module_inputs_func(
                info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
            )
            for i, given in enumerate(inputs):
                label = f"{name}-{given.desc or 'default'}-{training}-{i}"
                found.append(pytest.param(name, training, given, id=label))
    assert {param.values[0] for param in found} == set(THEIRS)
    return found


@pytest.mark.parametrize(("name", "training", "given"), torchs_inputs())
def test_torchs_module_inputs(backend: Any, name: str, training: bool, given: Any) -> None:
    make, call = given.constructor_input, given.forward_input
    options = {k: v for k, v in make.kwargs.items() if k not in ("device", "dtype")}
    modules = []
    for classes in (OURS, THEIRS):
        torch.manual_seed(0)
        module = classes[name](*make.args, **options).to(backend.device, torch.float64)
        modules.append(module.train(training))
    results = []
    for module in modules:
        torch.manual_seed(1)
        args, kwargs = copy.deepcopy((call.args, call.kwargs))
        outputs = flat(module(*args, **kwargs))
        grads = torch.autograd.grad(sum(o.sum() for o in outputs), list(module.parameters()))
        results.append([*outputs, *grads])
    assert_same(*results)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_states_are_cut_off_in_place(backend: Any, name: str, layers: int) -> None:
    """As truncated backpropagation through time does: the gradients of the second part alone."""
    found = []
    for classes in (OURS, THEIRS):
        torch.manual_seed(0)
        module = classes[name](3, 4, layers).to(backend.device, torch.float64)
        x = torch.randn(6, 2, 3, dtype=torch.float64).to(backend.device)
        _, state = module(x[:3])
        for t in flat(state):
            t.detach_()
        module(x[3:], state)[0].square().sum().backward()
        found.append([p.grad for p in module.parameters()])
    assert_same(*found)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_changed_in_place_by_hooks(backend: Any, name: str) -> None:
    found = []
    for classes in (OURS, THEIRS):
        torch.manual_seed(0)
        module = classes[name](3, 4).to(backend.device, torch.float64)
        for parameter in module.parameters():
            parameter.register_hook(lambda grad: grad.mul_(0.5))
        x = torch.randn(6, 2, 3, dtype=torch.float64).to(backend.device)
        flat(module(x if "Cell" not in name else x[0]))[0].square().sum().backward()
        found.append([p.grad for p in module.parameters()])
    assert_same(*found)
