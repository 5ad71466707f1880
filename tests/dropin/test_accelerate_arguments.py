"""Unusual arguments: what torch takes is taken, what it refuses is refused in its words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import CLASSES, CROSS_ENTROPY, both, randn
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import seqkern
from seqkern.dropin import conditions
from seqkern.dropin.counts import counting

X, Q = randn(4, 9), randn(1, 2, 3, 4)


class Duck:
    """No tensor, but torch's functions are told what to do with it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func.__name__, hasattr(func, "__wrapped__")


def attend(*args: Any, **kwargs: Any) -> Any:
    return F.scaled_dot_product_attention(*args, **kwargs)


def layer(kind: str, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(1)
    return getattr(torch.nn, kind)(9, 2, dtype=torch.float64)(*args, **kwargs)


CALLS: dict[str, Callable[[], Any]] = {
    "softmax-axis": lambda: torch.softmax(X, axis=-1),
    "softmax-out": lambda: torch.softmax(X, -1, out=torch.empty_like(X)),
    "softmax-no-out": lambda: torch.softmax(X, -1, out=None),
    "log-softmax-out": lambda: torch.log_softmax(X, -1, out=torch.empty_like(X)),
    "softmax-array": lambda: torch.softmax(X.numpy(), -1),
    "softmax-bool": lambda: torch.softmax(X, True),
    "softmax-no-dim": lambda: torch.softmax(X),
    "softmax-self": lambda: torch.softmax(self=X, dim=-1),
    "softmax-duck": lambda: torch.softmax(Duck(), -1),
    "method-input": lambda: torch.Tensor.softmax(input=X, dim=-1),
    "method-out": lambda: X.log_softmax(-1, out=torch.empty_like(X)),
    "loss-array": lambda: F.cross_entropy(X.numpy(), CLASSES),
    "loss-none": lambda: F.cross_entropy(X, None),
    "loss-float-index": lambda: F.cross_entropy(X, CLASSES, ignore_index=1.0),
    "loss-bool-index": lambda: F.cross_entropy(X, CLASSES, ignore_index=True),
    "loss-tensor-index": lambda: F.cross_entropy(X, CLASSES, ignore_index=torch.tensor(-100)),
    "loss-smoothing": lambda: F.cross_entropy(X, CLASSES, label_smoothing="a"),
    "loss-weight-list": lambda: F.cross_entropy(X, CLASSES, weight=[1.0] * 9),
    "loss-unknown": lambda: F.cross_entropy(X, CLASSES, foo=1),
    "loss-duck": lambda: F.cross_entropy(Duck(), CLASSES),
    "loss-duck-target": lambda: F.cross_entropy(X, Duck()),
    "attention-position": lambda: attend(Q, Q, Q, None, 0.0, True, 0.5),
    "attention-array": lambda: attend(Q.numpy(), Q, Q, is_causal=True),
    "attention-int": lambda: attend(Q, Q, Q, is_causal=1),
    "attention-dropout": lambda: attend(Q, Q, Q, is_causal=True, dropout_p="0"),
    "attention-scale": lambda: attend(Q, Q, Q, is_causal=True, scale="1"),
    "attention-scale-tensor": lambda: attend(Q, Q, Q, is_causal=True, scale=torch.tensor(0.5)),
    "linear-list": lambda: F.linear_cross_entropy(X, randn(5, 9), [0, 1, 2, 3]),
    "linear-duck": lambda: F.linear_cross_entropy(X, Duck(), CLASSES),
    "lstm-none": lambda: layer("LSTM", None),
    "lstm-array": lambda: layer("LSTM", X.numpy()),
    "lstm-unknown": lambda: layer("LSTM", X, foo=1),
    "lstm-keywords": lambda: layer("LSTM", input=X, hx=None),
    "gru-tuple": lambda: layer("GRU", X, (randn(1, 2),)),
    "rnn-tuple": lambda: layer("RNN", X, (randn(1, 2),)),
    "cell-unknown": lambda: layer("LSTMCell", X, foo=1),
    "gru-cell-tuple": lambda: layer("GRUCell", X, (randn(4, 2),)),
    "rnn-cell-unknown": lambda: layer("RNNCell", X, foo=1),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_torch_judges_them(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("softmax", "log_softmax"):
        monkeypatch.setitem(conditions.LARGE, name, 2)

    def ending() -> str:
        torch.manual_seed(2)
        try:
            return repr(call())
        except Exception as error:
            return repr(error)

    plain = ending()
    with seqkern.accelerate():
        assert ending() == plain


def test_a_softmax_writes_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(conditions.LARGE, "softmax", 2)
    out = torch.empty_like(X)
    with seqkern.accelerate():
        assert torch.softmax(X, -1, out=out) is out
    assert torch.equal(out, X.softmax(-1))


def test_symbolic_traces_are_torchs() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(torch.softmax(x, -1), y)

    plain = torch.fx.symbolic_trace(Net()).code
    with counting() as counts, seqkern.accelerate():
        assert torch.fx.symbolic_trace(Net()).code == plain
    assert counts[CROSS_ENTROPY, "a tensor subclass, Proxy"] == 1


# ---------------------------------------------------------------- autocast


def packed_gru(x: Tensor) -> Any:
    torch.manual_seed(1)
    output, last = torch.nn.GRU(5, 7)(pack_padded_sequence(x, torch.tensor([3, 1])))
    return output.data, last


def lstm(proj_size: int, packed: bool) -> Callable[..., Any]:
    def call(x: Tensor, *hx: Tensor) -> Any:
        torch.manual_seed(1)
        given = pack_padded_sequence(x, torch.tensor([3, 1])) if packed else x
        output, last = torch.nn.LSTM(5, 7, proj_size=proj_size)(given, hx or None)
        return output.data if packed else output, last

    return call


def gru(x: Tensor, *hx: Tensor) -> Any:
    torch.manual_seed(1)
    return torch.nn.GRU(5, 7)(x, *hx)


def cell(x: Tensor, *hx: Tensor) -> Any:
    torch.manual_seed(1)
    return torch.nn.LSTMCell(5, 7)(x, hx or None)


def hidden_cell(kind: str) -> Callable[..., Any]:
    def call(x: Tensor, *hx: Tensor) -> Any:
        torch.manual_seed(1)
        return [getattr(torch.nn, kind)(5, 7)(x, *hx)]

    return call


F32, BF16 = torch.float32, torch.bfloat16
AUTOCAST: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "gru": (gru, [randn(3, 2, 5, dtype=F32)]),
    "gru-state": (gru, [randn(3, 2, 5, dtype=BF16), randn(1, 2, 7, dtype=F32)]),
    "gru-16-bits": (gru, [randn(3, 2, 5, dtype=BF16)]),
    "gru-16-bit-state": (gru, [randn(3, 2, 5, dtype=F32), randn(1, 2, 7, dtype=BF16)]),
    "gru-packed": (packed_gru, [randn(3, 2, 5, dtype=F32)]),
    **{
        f"lstm-{proj_size}-{packed}-{name}": (
            lstm(proj_size, packed),
            [randn(3, 2, 5, dtype=x), *(randn(1, 2, n, dtype=s) for n in (proj_size or 7, 7) if s)],
        )
        for proj_size in (0, 3)
        for packed in (False, True)
        for name, x, s in (
            ("fp32", F32, None),
            ("16-bits", BF16, None),
            ("state", BF16, F32),
            ("16-bit-state", F32, BF16),
        )
    },
    "cell": (cell, [randn(2, 5, dtype=F32)]),
    "cell-state": (cell, [randn(2, 5, dtype=BF16), *(randn(2, 7, dtype=F32) for _ in "hc")]),
    "cell-16-bits": (cell, [randn(2, 5, dtype=BF16)]),
    **{
        f"{kind}-{name}": (hidden_cell(kind), [randn(2, 5, dtype=x), *hx])
        for kind in ("GRUCell", "RNNCell")
        for name, x, hx in (
            ("fp32", F32, []),
            ("state", BF16, [randn(2, 7, dtype=F32)]),
            ("16-bits", BF16, []),
            ("16-bit-state", F32, [randn(2, 7, dtype=BF16)]),
        )
    },
}


@pytest.mark.parametrize(("call", "tensors"), AUTOCAST.values(), ids=AUTOCAST)
def test_autocast_keeps_the_dtypes_of_states(
    call: Callable[..., Any], tensors: list[Tensor]
) -> None:
    def step(*inputs: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return call(*inputs)

    ours, theirs, counts = both(step, *tensors)
    assert [reason for _, reason in counts] == [""]
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, atol=0.03, rtol=0.05)  # and the dtype


def test_patched_modules_have_the_same_dtypes() -> None:
    model, x = torch.nn.GRU(5, 7), randn(3, 2, 5, dtype=F32)
    seqkern.patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert {t.dtype for t in model(x)} == {F32}


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_under_autocast_are_torchs(kind: str, dtype: torch.dtype) -> None:
    def ending() -> str:
        torch.manual_seed(1)
        module = getattr(torch.nn, kind)(9, 2)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                return repr(module(X.to(dtype)))
        except RuntimeError as error:
            return repr(error)

    plain = ending()
    with seqkern.accelerate():
        assert ending() == plain
