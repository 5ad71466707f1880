"""What ops.linear_cross_entropy says of arguments that do not fit, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqkern import ops

BAD_CALLS: dict[str, tuple[Any, str]] = {
    "hidden-dtype": (
        lambda h, w, t: ops.linear_cross_entropy(h.long(), w, t),
        r"hidden must be float32, float64, float16 or bfloat16, got int64 \[3, 4\]",
    ),
    "hidden-scalar": (
        lambda h, w, t: ops.linear_cross_entropy(h[0, 0], w, t[0]),
        r"hidden must be \[..., H\], got a scalar",
    ),
    "no-features": (
        lambda h, w, t: ops.linear_cross_entropy(h[:, :0], w[:, :0], t),
        r"hidden must have at least one feature, got float32 \[3, 0\]",
    ),
    "weight-shape": (
        lambda h, w, t: ops.linear_cross_entropy(h, w[:, :3], t),
        r"weight must be float32 \[V, 4\], got float32 \[5, 3\]",
    ),
    "weight-dtype": (
        lambda h, w, t: ops.linear_cross_entropy(h, w.double(), t),
        r"weight must be float32 \[V, 4\], got float64 \[5, 4\]",
    ),
    "no-classes": (
        lambda h, w, t: ops.linear_cross_entropy(h, w[:0], t),
        r"weight must be float32 \[V, 4\], got float32 \[0, 4\]",
    ),
    "target-shape": (
        lambda h, w, t: ops.linear_cross_entropy(h, w, t[:2]),
        r"target must be int64, int32 or uint8 \[3\], got int64 \[2\]",
    ),
    "target-dtype": (
        lambda h, w, t: ops.linear_cross_entropy(h, w, torch.zeros(3, 5, device=h.device)),
        r"target must be int64, int32 or uint8 \[3\], got float32 \[3, 5\]",
    ),
    "bias-shape": (
        lambda h, w, t: ops.linear_cross_entropy(h, w, t, h[0]),
        r"bias must be floating point \[5\], got float32 \[4\]",
    ),
    "class-weight-shape": (
        lambda h, w, t: ops.linear_cross_entropy(h, w, t, class_weight=h[0]),
        r"class_weight must be floating point \[5\], got float32 \[4\]",
    ),
    "class-weight-gradient": (
        lambda h, w, t: ops.linear_cross_entropy(
            h, w, t, class_weight=torch.ones(5, requires_grad=True)
        ),
        r"class_weight has no gradient here; pass class_weight.detach\(\)",
    ),
    "reduction": (
        lambda h, w, t: ops.linear_cross_entropy(h, w, t, reduction="avg"),
        "reduction must be 'none', 'mean' or 'sum', got 'avg'",
    ),
    "smoothing": (
        lambda h, w, t: ops.linear_cross_entropy(h, w, t, label_smoothing=-0.5),
        "label_smoothing must be between 0 and 1, got -0.5",
    ),
    "z_loss": (
        lambda h, w, t: ops.linear_cross_entropy(h, w, t, z_loss=-1.0),
        "z_loss must be at least 0, got -1",
    ),
    "softcap": (
        lambda h, w, t: ops.linear_cross_entropy(h, w, t, softcap=float("nan")),
        "softcap must be at least 0 and finite, got nan",
    ),
    "softcap-infinite": (
        lambda h, w, t: ops.linear_cross_entropy(h, w, t, softcap=float("inf")),
        "softcap must be at least 0 and finite, got inf",
    ),
    "chunk": (
        lambda h, w, t: ops.linear_cross_entropy(h, w, t, chunk_bytes=0),
        "chunk_bytes must be positive, got 0",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_errors(backend: Any, call: Any, message: str) -> None:
    hidden = torch.randn(3, 4, device=backend.device)
    weight = torch.randn(5, 4, device=backend.device)
    target = torch.tensor([0, 1, 2], device=backend.device)
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}") as raised:
        call(hidden, weight, target)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [-1, 5, 2**40, -(2**40)])
def test_target_out_of_range_on_the_cpu(value: int) -> None:
    message = (
        rf"linear_cross_entropy: target must be in \[0, 5\) or ignore_index \(-100\), "
        rf"got {value} at row 1"
    )
    with pytest.raises(IndexError, match=message):
        ops.linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, value, 2]))


@pytest.mark.parametrize("backend", ["emu", "cuda"], indirect=True)
@pytest.mark.parametrize("value", [-1, 5, 2**40, -(2**40)])
def test_target_out_of_range_on_cuda(backend: Any, value: int) -> None:
    hidden = torch.randn(3, 4, device=backend.device, requires_grad=True)
    weight = torch.randn(5, 4, device=backend.device)
    target = torch.tensor([0, value, 2], device=backend.device)
    loss = ops.linear_cross_entropy(hidden, weight, target, reduction="none")
    assert isinstance(loss, torch.Tensor)
    loss.sum().backward()
    assert hidden.grad is not None
    assert loss.isnan().tolist() == [False, True, False]
    assert hidden.grad.isnan().any(-1).tolist() == [False, True, False]
