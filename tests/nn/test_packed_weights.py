"""keep_packed of the cells: a copy of the weights that never outlives them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import seqkern

ROWS = 40  # that are worth packed weights in every dtype, on every processor


def cells() -> tuple[Any, Any, Tensor]:
    """Ours, which has kept its weights packed once, torch's with the same, and an input."""
    ours, theirs = seqkern.nn.LSTMCell(16, 32), torch.nn.LSTMCell(16, 32)
    ours.load_state_dict(theirs.state_dict())
    assert ours.keep_packed() is ours
    x = torch.randn(ROWS, 16)
    run(ours, x)
    return ours, theirs, x


def run(cell: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A step from a state where both weights matter."""
    state = torch.linspace(-1, 1, ROWS * 32, dtype=x.dtype).reshape(ROWS, 32)
    h, c = cell(x, (state, state.flip(0)))
    return h, c


def assert_same(ours: Any, theirs: Any, x: Tensor) -> None:
    for actual, expected in zip(run(ours, x), run(theirs, x), strict=True):
        torch.testing.assert_close(actual, expected)


def packings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one with each packing from now on."""
    calls: list[Any] = []
    real = torch.ops.seqkern.cell_pack

    class Counted:
        def __getattr__(self, name: str) -> Any:
            if name != "cell_pack":
                return getattr(torch.ops.seqkern, name)
            return lambda *args: (calls.append(args), real(*args))[1]

    monkeypatch.setattr(seqkern.ops._registry, "active", Counted())
    return calls


def add_in_place(cell: Any) -> None:
    with torch.no_grad():
        cell.weight_hh.add_(0.1)


def step_of(optimizer: Any) -> Callable[[Any], None]:
    def change(cell: Any) -> None:
        cell(torch.ones(3, 16))[0].sum().backward()
        optimizer(cell.parameters(), lr=0.5).step()

    return change


def swap_memory(cell: Any) -> None:
    cell.weight_ih.data = torch.ones(128, 16)


def swap_parameter(cell: Any) -> None:
    cell.weight_hh = torch.nn.Parameter(torch.ones(128, 32))


def swap_back_and_forth(cell: Any) -> None:
    """Memory that may lie where the old one was."""
    for value in (0.1, 0.2, 0.3):
        cell.weight_ih.data = torch.full((128, 16), value)


def write_through_a_view(cell: Any) -> None:
    with torch.no_grad():
        cell.weight_ih[3].zero_()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in-place": add_in_place,
    "sgd": step_of(torch.optim.SGD),
    "adam": step_of(torch.optim.Adam),
    "fused": step_of(lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, fused=True)),
    "memory": swap_memory,
    "memory-again": swap_back_and_forth,
    "parameter": swap_parameter,
    "view": write_through_a_view,
    "state_dict": lambda cell: cell.load_state_dict(
        {k: v + 1 for k, v in cell.state_dict().items()}
    ),
    "clip": lambda cell: torch.nn.utils.vector_to_parameters(
        torch.linspace(-1, 1, 128 * 50), cell.parameters()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: str) -> None:
    ours, theirs, x = cells()
    before = run(ours, x)[0]
    CHANGES[change](ours)
    CHANGES[change](theirs)
    assert_same(ours, theirs, x)
    assert not torch.allclose(run(ours, x)[0], before)


def test_writes_through_data_after_another_call() -> None:
    """What no counter sees, and what the docstring asks for then."""
    ours, theirs, x = cells()
    for cell in (ours, theirs):
        cell.weight_ih.data.mul_(-2)
    ours.keep_packed()
    assert_same(ours, theirs, x)
    for cell in (ours, theirs):
        cell.weight_ih.data.mul_(-2)
    ours.keep_packed(False)
    assert_same(ours, theirs, x)


def test_packs_once_per_change(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _, x = cells()
    calls = packings(monkeypatch)
    ours.keep_packed()
    for _ in range(3):
        ours(x)
        with torch.no_grad():
            ours(x)
    assert len(calls) == 1
    add_in_place(ours)
    ours(x)
    ours(x)
    assert len(calls) == 2
    ours.keep_packed(False)
    ours(x)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_training_is_that_without(dtype: torch.dtype) -> None:
    """Losses and gradients of a few steps of a loop over time, weights changing in between."""
    results = []
    for keep in (False, True):
        torch.manual_seed(1)
        cell = seqkern.nn.LSTMCell(16, 32, dtype=dtype).keep_packed(keep)
        optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
        x = torch.randn(5, ROWS, 16, dtype=dtype)
        for _ in range(3):
            state = None
            for x_t in x:
                state = cell(x_t, state)
            assert state is not None
            loss = state[0].float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append([loss.detach(), *(p.grad for p in cell.parameters())])
    for actual, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, expected)


def test_other_threads_and_dtypes() -> None:
    ours, theirs, x = cells()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert_same(ours, theirs, x)
    finally:
        torch.set_num_threads(before)
    assert_same(ours.double(), theirs.double(), x.double())


def test_autocast() -> None:
    ours, theirs, x = cells()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for actual, expected in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.02)  # and the dtype


def test_inference_mode() -> None:
    with torch.inference_mode():
        ours, theirs, x = cells()  # parameters that count no versions
        for cell in (ours, theirs):
            cell.weight_hh.add_(0.1)
        assert_same(ours, theirs, x)


def test_functional_call() -> None:
    ours, theirs, x = cells()
    other = {k: v + 0.5 for k, v in theirs.state_dict().items()}
    found = torch.func.functional_call(ours, other, x)
    for actual, expected in zip(found, torch.func.functional_call(theirs, other, x), strict=True):
        torch.testing.assert_close(actual, expected)
    assert_same(ours, theirs, x)


def test_copies_and_files_are_without() -> None:
    ours, theirs, x = cells()
    twin = copy.deepcopy(ours)
    file = io.BytesIO()
    torch.save(ours, file)
    assert file.tell() < 3 * sum(p.numel() * 4 for p in ours.parameters()) / 2 + 8192
    file.seek(0)
    for cell in (twin, torch.load(file, weights_only=False)):
        assert_same(cell, theirs, x)
        add_in_place(cell)
        with pytest.raises(AssertionError):
            assert_same(cell, theirs, x)
    assert_same(ours, theirs, x)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_compile() -> None:
    ours, theirs, x = cells()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert_same(compiled, theirs, x)
    add_in_place(ours)
    add_in_place(theirs)
    assert_same(compiled, theirs, x)


def test_patched_module() -> None:
    """A module whose class is swapped in place has no copy until asked for."""
    model = torch.nn.Sequential(torch.nn.LSTMCell(16, 32))
    seqkern.patch(model)
    x = torch.randn(ROWS, 16)
    cell: Any = model[0]
    expected = cell(x)
    for actual, wanted in zip(cell.keep_packed()(x), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
