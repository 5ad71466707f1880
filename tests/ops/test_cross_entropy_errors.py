"""What ops.cross_entropy says of arguments that do not fit, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqkern import ops

BAD_CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "target-shape": (
        lambda x, t: ops.cross_entropy(x, t[:2]),
        ValueError,
        r"cross_entropy: target must be int64, int32 or uint8 \[3\], got int64 \[2\]",
    ),
    "target-dtype": (
        lambda x, t: ops.cross_entropy(x, t.bool()),
        ValueError,
        r"target must be int64, int32 or uint8 \[3\], got bool \[3\]",
    ),
    "logits-dtype": (
        lambda x, t: ops.cross_entropy(x.long(), t),
        ValueError,
        r"logits must be float32, float64, float16 or bfloat16, got int64 \[3, 5\]",
    ),
    "probabilities-shape": (
        lambda x, t: ops.cross_entropy(x, x[:, :4]),
        ValueError,
        r"target of class probabilities must be float32 \[3, 5\], got float32 \[3, 4\]",
    ),
    "weight-shape": (
        lambda x, t: ops.cross_entropy(x, t, x[0, :4]),
        ValueError,
        r"weight must be floating point \[5\], got float32 \[4\]",
    ),
    "weight-gradient": (
        lambda x, t: ops.cross_entropy(x, t, torch.ones(5, requires_grad=True)),
        ValueError,
        r"weight has no gradient here; pass weight.detach\(\)",
    ),
    "reduction": (
        lambda x, t: ops.cross_entropy(x, t, reduction="avg"),
        ValueError,
        "reduction must be 'none', 'mean' or 'sum', got 'avg'",
    ),
    "smoothing": (
        lambda x, t: ops.cross_entropy(x, t, label_smoothing=1.5),
        ValueError,
        "label_smoothing must be between 0 and 1, got 1.5",
    ),
    "z_loss": (
        lambda x, t: ops.cross_entropy(x, t, z_loss=-1.0),
        ValueError,
        "z_loss must be at least 0, got -1",
    ),
    "softcap": (
        lambda x, t: ops.cross_entropy(x, t, softcap=float("nan")),
        ValueError,
        "softcap must be at least 0 and finite, got nan",
    ),
    "softcap-infinite": (
        lambda x, t: ops.cross_entropy(x, t, softcap=float("inf")),
        ValueError,
        "softcap must be at least 0 and finite, got inf",
    ),
    "ignore-with-probabilities": (
        lambda x, t: ops.cross_entropy(x, x, ignore_index=1),
        ValueError,
        "ignore_index must be negative with class probabilities, got 1",
    ),
    "scalar": (
        lambda x, t: ops.cross_entropy(x[0, 0], t),
        ValueError,
        r"logits must be \[V\] or \[B, V, ...\], got a scalar",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_errors(backend: Any, call: Any, error: type[Exception], message: str) -> None:
    logits = torch.randn(3, 5, device=backend.device)
    target = torch.tensor([0, 1, 2], device=backend.device)
    with pytest.raises(error, match=message) as raised:
        call(logits, target)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [-1, 5, 2**40, -(2**40)])
def test_target_out_of_range_on_the_cpu(value: int) -> None:
    target = torch.tensor([0, value, 2])
    message = (
        rf"cross_entropy: target must be in \[0, 5\) or ignore_index \(-100\), got {value} at row 1"
    )
    with pytest.raises(IndexError, match=message):
        ops.cross_entropy(torch.randn(3, 5), target)


@pytest.mark.parametrize("backend", ["emu", "cuda"], indirect=True)
@pytest.mark.parametrize("value", [-1, 5, 2**40, -(2**40)])
def test_target_out_of_range_on_cuda(backend: Any, value: int) -> None:
    x = torch.randn(3, 5, device=backend.device, requires_grad=True)
    target = torch.tensor([0, value, 2], device=backend.device)
    loss = ops.cross_entropy(x, target, reduction="none")
    loss.sum().backward()
    assert x.grad is not None
    assert loss.isnan().tolist() == [False, True, False]
    assert x.grad.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("backend", ["emu", "cuda"], indirect=True)
def test_rows_that_an_int_does_not_hold(backend: Any) -> None:
    """With the step beyond their end that a block takes: refused, and the memory never touched."""
    x = torch.empty(1, 2**31 - 100, dtype=torch.bfloat16, device=backend.device)
    message = "cross_entropy: rows must have at most 2147475456 elements on CUDA, got 2147483548"
    with pytest.raises(ValueError, match=f"^{message}$"):
        ops.cross_entropy(x, torch.tensor([1], device=backend.device))
    with pytest.raises(ValueError, match=r"^softmax: rows must have at most 2147475456 elements"):
        ops.softmax(x)
