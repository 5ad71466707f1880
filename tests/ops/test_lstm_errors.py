"""What ops.lstm says of arguments that do not fit, on every backend that has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recurrent import weights
from seqkern import ops


def call(device: str, **changed: Any) -> Any:
    """ops.lstm of T 4, B 3, I 5, H 7 with some arguments replaced by functions of themselves."""
    w_ih, w_hh, b_ih, b_hh, _ = weights(4, 5, 7, torch.float32, device)
    arguments: dict[str, Any] = {
        "input": torch.randn(4, 3, 5, device=device),
        "state": (torch.randn(3, 7, device=device), torch.randn(3, 7, device=device)),
        "w_ih": w_ih,
        "w_hh": w_hh,
        "b_ih": b_ih,
        "b_hh": b_hh,
        "w_hr": None,
        "lengths": None,
    }
    for name, change in changed.items():
        arguments[name] = change(arguments[name])
    return ops.lstm(**arguments)


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "input-dim": (
        {"input": lambda x: x[0]},
        r"lstm: input must be \[T, B, I\], got float32 \[3, 5\]",
    ),
    "input-dtype": (
        {"input": lambda x: x.long()},
        r"lstm: input must be float32, float64, float16 or bfloat16, got int64 \[4, 3, 5\]",
    ),
    "no-steps": (
        {"input": lambda x: x[:0]},
        r"input must have at least one step, got .* \[0, 3, 5\]",
    ),
    "w_ih": (
        {"w_ih": lambda w: w[:, :4]},
        r"w_ih must be float32 \[28, 5\], got float32 \[28, 4\]",
    ),
    "w_ih-gates": (
        {"w_ih": lambda w: w[:27]},
        r"w_ih must be \[4 H, I\], got float32 \[27, 5\]",
    ),
    "w_hh": (
        {"w_hh": lambda w: w.T},
        r"w_hh must be float32 \[28, 7\], got float32 \[7, 28\]",
    ),
    "dtype": (
        {"w_hh": lambda w: w.half()},
        r"w_hh must be float32 \[28, 7\], got float16 \[28, 7\]",
    ),
    "b_ih": ({"b_ih": lambda b: b[1:]}, r"b_ih must be float32 \[28\], got float32 \[27\]"),
    "b_hh": ({"b_hh": lambda b: b[1:]}, r"b_hh must be float32 \[28\], got float32 \[27\]"),
    "w_hr": (
        {"w_hr": lambda _: torch.randn(2, 6), "w_hh": lambda w: w[:, :2]},
        r"w_hr must be float32 \[2, 7\], got float32 \[2, 6\]",
    ),
    "h0": (
        {"state": lambda s: (s[0][:2], s[1])},
        r"h0 must be float32 \[3, 7\], got float32 \[2, 7\]",
    ),
    "c0": (
        {"state": lambda s: (s[0], s[1][:, :6])},
        r"c0 must be float32 \[3, 7\], got float32 \[3, 6\]",
    ),
    "lengths-shape": (
        {"lengths": lambda _: torch.tensor([1, 2])},
        r"lengths must be int64 or int32 \[3\], got int64 \[2\]",
    ),
    "lengths-dtype": (
        {"lengths": lambda _: torch.tensor([1.0, 2, 3])},
        r"lengths must be int64 or int32 \[3\], got float32 \[3\]",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(backend: Any, name: str) -> None:
    changed, text = BAD_CALLS[name]
    with pytest.raises(ValueError, match=text):
        call(backend.device, **changed)


@pytest.mark.parametrize("bad", [-1, 5])
def test_lengths_out_of_range(bad: int) -> None:
    with pytest.raises(ValueError, match=rf"lengths must be in \[0, 4\], got {bad} at row 1"):
        call("cpu", lengths=lambda _: torch.tensor([1, bad, 4]))
