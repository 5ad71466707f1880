"""What ops.gru and ops.rnn say of arguments that do not fit, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hidden_cases import make

from seqkern import ops

NAMES = ("input", "h0", "w_ih", "w_hh", "b_ih", "b_hh")


def call(op: str, device: str, **changed: Any) -> Any:
    """The op of T 4, B 3, I 5, H 7 with some arguments replaced by functions of themselves."""
    tensors = make({"gru": "gru", "rnn": "tanh"}[op], (4, 3, 5, 7), torch.float32, device)
    arguments: dict[str, Any] = dict(zip(NAMES, tensors, strict=True))
    for name, change in changed.items():
        arguments[name] = change(arguments.get(name))
    return getattr(ops, op)(**arguments)


#: What is changed; the error, with G for 3 H or H in numbers
BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "input-dim": (
        {"input": lambda x: x[0]},
        r"{op}: input must be \[T, B, I\], got float32 \[3, 5\]",
    ),
    "input-dtype": (
        {"input": lambda x: x.long()},
        r"{op}: input must be float32, float64, float16 or bfloat16, got int64 \[4, 3, 5\]",
    ),
    "no-steps": (
        {"input": lambda x: x[:0]},
        r"{op}: input must have at least one step, got float32 \[0, 3, 5\]",
    ),
    "w_ih": (
        {"w_ih": lambda w: w[:, :4]},
        r"{op}: w_ih must be float32 \[{G}, 5\], got float32 \[{G}, 4\]",
    ),
    "w_ih-dim": (
        {"w_ih": lambda w: w[0]},
        r"{op}: w_ih must be \[{GH}, I\], got float32 \[5\]",
    ),
    "w_hh": (
        {"w_hh": lambda w: w[:, :6]},
        r"{op}: w_hh must be float32 \[{G}, 7\], got float32 \[{G}, 6\]",
    ),
    "dtype": (
        {"w_hh": lambda w: w.half()},
        r"{op}: w_hh must be float32 \[{G}, 7\], got float16 \[{G}, 7\]",
    ),
    "b_ih": (
        {"b_ih": lambda b: b[None]},
        r"{op}: b_ih must be float32 \[{G}\], got float32 \[1, {G}\]",
    ),
    "b_hh": (
        {"b_hh": lambda b: b.double()},
        r"{op}: b_hh must be float32 \[{G}\], got float64 \[{G}\]",
    ),
    "h0": (
        {"h0": lambda h: h[:2]},
        r"{op}: h0 must be float32 \[3, 7\], got float32 \[2, 7\]",
    ),
    "lengths-shape": (
        {"lengths": lambda _: torch.tensor([1, 2])},
        r"{op}: lengths must be int64 or int32 \[3\], got int64 \[2\]",
    ),
    "lengths-dtype": (
        {"lengths": lambda _: torch.tensor([1.0, 2, 3])},
        r"{op}: lengths must be int64 or int32 \[3\], got float32 \[3\]",
    ),
}


@pytest.mark.parametrize("op", ["gru", "rnn"])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(backend: Any, name: str, op: str) -> None:
    changed, text = BAD_CALLS[name]
    values = {"gru": ("21", r"3 H"), "rnn": ("7", "H")}[op]
    expected = text.replace("{op}", op).replace("{GH}", values[1]).replace("{G}", values[0])
    with pytest.raises(ValueError, match=f"^{expected}"):
        call(op, backend.device, **changed)


def test_gates_that_do_not_fit_the_weights(backend: Any) -> None:
    with pytest.raises(ValueError, match=r"gru: w_ih must be \[3 H, I\], got float32 \[20, 5\]"):
        call("gru", backend.device, w_ih=lambda w: w[:20])


def test_nonlinearity() -> None:
    with pytest.raises(ValueError, match="rnn: nonlinearity must be 'tanh' or 'relu', got 'gelu'"):
        call("rnn", "cpu", nonlinearity=lambda _: "gelu")


@pytest.mark.parametrize("op", ["gru", "rnn"])
@pytest.mark.parametrize("bad", [-1, 5])
def test_lengths_out_of_range(op: str, bad: int) -> None:
    with pytest.raises(ValueError, match=rf"{op}: lengths must be in \[0, 4\], got {bad} at row 1"):
        call(op, "cpu", lengths=lambda _: torch.tensor([1, bad, 4]))
