"""Models that hold torch's functions are pickled in a block, after it, and where there was none."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import CLASSES, CROSS_ENTROPY, randn
from torch import Tensor

import seqkern
from seqkern.dropin import counts

NAMES = {
    "cross_entropy": lambda: F.cross_entropy,
    "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention,
    "softmax": lambda: torch.softmax,
    "log_softmax": lambda: torch.log_softmax,
    "method": lambda: Tensor.softmax,
    "forward": lambda: torch.nn.LSTM.forward,
}


class Net(torch.nn.Module):
    """A layer, and a function that stands for it."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.linear, self.function = torch.nn.Linear(2, 2), function


def through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: list[Callable[[Any], Any]] = [
    through_torch,
    copy.deepcopy,
    *(lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(2, 6)),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_made_in_a_block(name: str, way: Callable[[Any], Any]) -> None:
    torchs = NAMES[name]()
    with seqkern.accelerate():
        net = Net(NAMES[name]())
        assert net.function is not torchs
        assert way(net).function is net.function
        with seqkern.accelerate():
            assert way(net).function is net.function
    assert way(net).function is net.function
    with seqkern.accelerate():  # another one, but the same functions
        assert NAMES[name]() is net.function
        assert way(net).function is net.function
    assert way(net).function is net.function


def test_what_is_loaded_runs() -> None:
    x = randn(4, 9)
    expected = F.cross_entropy(x, CLASSES)
    with seqkern.accelerate():
        written = pickle.dumps(Net(F.cross_entropy))
        net = Net(F.cross_entropy)
    assert pickle.loads(written).function is F.cross_entropy  # torch's, by its name
    loaded = pickle.loads(pickle.dumps(net))
    assert torch.equal(loaded.function(x, CLASSES), expected)
    with counts.counting() as seen, seqkern.accelerate():
        torch.testing.assert_close(loaded.function(x, CLASSES), expected)
    assert seen == {(CROSS_ENTROPY, ""): 1}


def test_loaded_where_no_block_was_it_is_torchs() -> None:
    with seqkern.accelerate():
        functions = [make() for make in NAMES.values()]
    written = pickle.dumps(functions)
    code = (
        "import pickle, sys, torch, torch.nn.functional as F\n"
        "assert pickle.loads(sys.stdin.buffer.read()) == [F.cross_entropy, \n"
        "    F.scaled_dot_product_attention, torch.softmax, torch.log_softmax,\n"
        "    torch.Tensor.softmax, torch.nn.LSTM.forward]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=written, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_written_in_a_block_it_needs_no_seqkern() -> None:
    with seqkern.accelerate():
        written = pickle.dumps([make() for make in NAMES.values()])
    assert b"seqkern" not in written
    assert pickle.loads(written) == [make() for make in NAMES.values()]


def test_torchs_own_in_a_block() -> None:
    """What the docs of `accelerate` say: builtins have names of their own, Python's do not."""
    attention, loss = Net(F.scaled_dot_product_attention), Net(F.cross_entropy)
    with seqkern.accelerate():
        assert through_torch(attention).function is attention.function
        assert list(through_torch(loss.state_dict())) == list(loss.state_dict())
        with pytest.raises(pickle.PicklingError, match="not the same object"):
            through_torch(loss)
    assert through_torch(loss).function is loss.function


def test_no_other_names() -> None:
    from seqkern.dropin import kept

    for name in ("torch__nn__no_such", "os__system", "torch", "__path__"):
        with pytest.raises(AttributeError, match=name):
            getattr(kept, name)
