"""The recurrent modules are torch's: classes, state_dicts, and PyTorch's own test inputs."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from recurrent_modules import assert_same, flat
from torch.nn.utils.rnn import pack_padded_sequence
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


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"batch_first": True}])
@pytest.mark.parametrize("way", ["ours", "patched", "accelerated"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_packed_sequences_drop_what_torch_drops(
    name: str, way: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    theirs = THEIRS[name](5, 8, 3, dropout=0.4, dtype=torch.float64, **options)
    ours = OURS[name](5, 8, 3, dropout=0.4, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    if way != "ours":
        ours = copy.deepcopy(theirs)
    if way == "patched":
        assert seqkern.patch(ours).swapped
    x = torch.randn(*((4, 6) if "batch_first" in options else (6, 4)), 5, dtype=torch.float64)
    results = []
    for module in (theirs, ours):
        own = x.clone().requires_grad_()
        first = options.get("batch_first", False)
        packed = pack_padded_sequence(own, torch.tensor([2, 6, 1, 4]), first, enforce_sorted=False)
        torch.manual_seed(3)
        with seqkern.accelerate() if module is ours and way == "accelerated" else nullcontext():
            output, state = module(packed)
        drawn = torch.rand(1)
        grads = torch.autograd.grad(output.data.square().sum(), [own, *module.parameters()])
        results.append([drawn, output.data, *flat(state), *grads])
    assert_same(*results)
    assert torch.equal(results[0][0], results[1][0])
