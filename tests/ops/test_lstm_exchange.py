"""How the blocks of the resident LSTM in 16 bits hand each other h: by values that say themselves
which round they are from, or by flags (csrc/cuda/resident_exchange.cuh). What is multiplied and
added is the same, so both must give the same bits, NaN in the same places."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch
from resident_cases import T16, Device, assert_near, in_double, library, set_device
from test_lstm import exact, make
from torch import Tensor

from seqkern.ops import _registry

__all__ = ["library"]

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """A layer on a device."""

    device: Device
    shape: tuple[int, int, int]  # T, B, H
    orders: int = 3  # of threads that are tried


#: Blocks, tiles of rows, stages, passes and sets; units that end within a piece, a group, a chunk.
CASES = {
    "one-unit": Case(Device(2), (3, 1, 1)),
    "one-block": Case(Device(1), (5, 3, 16)),
    "one-step": Case(Device(4), (1, 9, 40)),
    "two-steps": Case(Device(8), (2, 9, 27)),
    "several-sets-the-last-empty": Case(Device(2), (5, 2, 37)),
    "a-block-per-group": Case(Device(9), (7, 1, 68)),
    "batch-groups": Case(Device(7), (4, 21, 16)),
    "pairs-of-groups": Case(Device(2), (4, 17, 16)),
    "pairs-of-groups-2-passes": Case(Device(2), (4, 43, 16)),
    "passes": Case(Device(1), (4, 70, 9)),
    "2-tiles": Case(Device(3), (5, 16, 20)),
    "pairs-of-groups-chunks-2": Case(Device(5), (3, 21, 280), 1),
    "3-tiles-2-stages": Case(Device(33), (4, 17, 264), 1),
}
case_of = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# Two that wait in every way are enough where what is exchanged is the subject.
few = pytest.mark.parametrize("name", ["several-sets-the-last-empty", "pairs-of-groups", "2-tiles"])


def forward(
    tensors: list[Tensor | None], lengths: Tensor | None = None, reverse: bool = False
) -> list[Tensor]:
    """Output, h_n, c_n, c of all steps and the gates."""
    with torch.no_grad():
        op = _registry.active.lstm_forward
        return list(_registry.call(op, *tensors, lengths, reverse, True, True))


def both(
    monkeypatch: pytest.MonkeyPatch,
    tensors: list[Tensor | None],
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> list[Tensor]:
    """The results, the same in both ways."""
    monkeypatch.setenv("SEQKERN_LSTM_EXCHANGE", "flags")
    by_flags = forward(tensors, lengths, reverse)
    monkeypatch.setenv("SEQKERN_LSTM_EXCHANGE", "values")
    by_values = forward(tensors, lengths, reverse)
    for actual, expected in zip(by_values, by_flags, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    return by_values


def layer(case: Case, dtype: torch.dtype) -> list[Tensor | None]:
    T, B, H = case.shape
    return make((T, B, 2, H), dtype, "cpu")


def of(tensors: list[Tensor | None], n: int) -> Tensor:
    tensor = tensors[n]
    assert tensor is not None
    return tensor


@pytest.mark.parametrize("options", ["plain", "reverse-lengths"])
@pytest.mark.parametrize("dtype", T16, ids=str)
@case_of
def test_same_bits(
    library: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    case: Case,
    dtype: torch.dtype,
    options: str,
) -> None:
    """Under several orders of threads, in workspaces that hold what earlier launches left."""
    set_device(library, case.device)
    T, B, _ = case.shape
    reverse = options != "plain"
    lengths = None
    if reverse:
        lengths = torch.arange(B) * 5 % (T + 1)  # rows that end at every step, 0 among them
        lengths[-1] = T
    tensors = layer(case, dtype)
    for seed in range(case.orders):
        library.seqkern_emu_set_seed(seed)
        found = both(monkeypatch, tensors, lengths, reverse)
    assert_near(found[:3], list(exact(reverse, lengths)(*in_double(tensors))), dtype)


@pytest.mark.parametrize("dtype", T16, ids=str)
@few
def test_rows_that_end_together(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    """All rows but one are over long before it."""
    case = CASES[name]
    set_device(library, case.device)
    T, B, _ = case.shape
    for long_one in {0, B - 1}:
        lengths = torch.ones(B, dtype=torch.int64)
        lengths[long_one] = T
        both(monkeypatch, layer(case, dtype), lengths)


@pytest.mark.parametrize("value", [3.0, -5.0, INF, NAN], ids=str)
@pytest.mark.parametrize("dtype", T16, ids=str)
@few
def test_any_initial_state(
    library: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    dtype: torch.dtype,
    value: float,
) -> None:
    """h0 is no h of a step: beyond 1, infinite, no number."""
    case = CASES[name]
    set_device(library, case.device)
    tensors = layer(case, dtype)
    of(tensors, 1).fill_(value)
    both(monkeypatch, tensors)
    tensors = layer(case, dtype)
    of(tensors, 1)[0] = value
    others = both(monkeypatch, tensors)[0][:, 1:]
    of(tensors, 1)[0] = 0
    assert torch.equal(others, forward(tensors)[0][:, 1:])


@pytest.mark.parametrize("dtype", T16, ids=str)
@few
def test_saturated(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    """Gates of 1 and a large c: h is 1 or -1, the largest that is exchanged."""
    case = CASES[name]
    set_device(library, case.device)
    _, _, H = case.shape
    tensors = layer(case, dtype)
    signs = torch.tensor([1, -1]).repeat(H)[:H]
    of(tensors, 2).copy_(20 * signs)  # c0
    of(tensors, 6).view(4, H)[:] = 20 * torch.stack([signs.abs()] * 2 + [signs, signs.abs()])
    output = both(monkeypatch, tensors)[0]
    assert torch.equal(output, signs.to(dtype).expand_as(output))


@pytest.mark.parametrize("where", ["one-number", "one-row", "all-rows", "c0"])
@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize("step", [0, 1, 2])
@few
def test_nan_and_infinity(
    library: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    step: int,
    value: float,
    where: str,
) -> None:
    """From the step where the input has it on, in its rows and no others."""
    case = CASES[name]
    set_device(library, case.device)
    _, B, H = case.shape
    bad = layer(case, torch.bfloat16)
    good = [t if t is None else t.clone() for t in bad]
    input, c0 = of(bad, 0), of(bad, 2)
    row = B // 2
    if where == "c0":
        c0[row, H // 2] = value
    else:
        at = {"one-number": (row, 0), "one-row": (row,), "all-rows": ()}[where]
        input[step][at] = value
    for seed in range(2):
        library.seqkern_emu_set_seed(seed)
        output = both(monkeypatch, bad)[0]
    if value != value and where != "c0":
        assert output[step:, row].isnan().all()
        assert not output[:step].isnan().any()
    if where != "all-rows":
        others = [b for b in range(B) if b != row]
        assert torch.equal(output[:, others], forward(good)[0][:, others])


@pytest.mark.parametrize("unit", [0, 7, 8, 15])
@pytest.mark.parametrize("lengths", [False, True])
@few
def test_a_unit_that_becomes_nan(
    library: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    lengths: bool,
    unit: int,
) -> None:
    """A NaN weight makes one unit's h NaN, in all rows; in the next step it is in all units. Each
    unit of a piece, and rows that then end while others go on."""
    case = CASES[name]
    set_device(library, case.device)
    T, B, H = case.shape
    tensors = layer(case, torch.bfloat16)
    of(tensors, 4)[3 * H + unit] = NAN  # w_hh of the output gate: c of the unit stays a number
    L = None
    if lengths:
        L = torch.arange(B) % T + 1
        L[-1] = T
    for seed in range(2):
        library.seqkern_emu_set_seed(seed)
        output = both(monkeypatch, tensors, L)[0]
    assert output[0, :, unit].isnan().all()
    assert not output[0, :, :unit].isnan().any()


def test_there_is_no_third_way(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQKERN_LSTM_EXCHANGE", "letters")
    with pytest.raises(ValueError, match="SEQKERN_LSTM_EXCHANGE must be flags or values"):
        forward(layer(CASES["one-block"], torch.bfloat16))
