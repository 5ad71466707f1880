"""How ops.linear_cross_entropy cuts its logits changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_linear_cross_entropy import DTYPES, double, make, plain, run

from accuracy import assert_accurate
from seqkern import ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("chunk_bytes", [1, 3000, 10**9])
def test_chunks_do_not_change_the_result(
    backend: Any, chunk_bytes: int, reduction: str, dtype: torch.dtype
) -> None:
    inputs = make(9, 4, 50, dtype, backend.device)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1}
    loss, grads = run(ops.linear_cross_entropy, inputs, True, chunk_bytes=chunk_bytes, **options)
    torch_loss, torch_grads = run(plain, inputs, True, **options)
    exact_loss, exact_grads = run(plain, double(inputs), True, **options)
    assert_accurate(loss, torch_loss, exact_loss, torch.promote_types(dtype, torch.float32))
    for ours, theirs, exact in zip(grads, torch_grads, exact_grads, strict=True):
        assert_accurate(ours, theirs, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    ("rows", "chunk_bytes"),
    # Bytes of a logit and its gradient on CUDA: 6. All rows through tiles of 16 of the 37 classes
    # and a rest; chunks of many rows, whose parts of weight's gradient are added.
    [(40, 40 * 16 * 6), (2900, 1450 * 37 * 6)],
    ids=["vocabulary", "rows"],
)
def test_how_a_device_cuts_16_bit_logits(
    backend: Any, rows: int, chunk_bytes: int, reduction: str, dtype: torch.dtype
) -> None:
    inputs = make(rows, 5, 37, dtype, backend.device)
    options: dict[str, Any] = {"reduction": reduction}
    loss, grads = run(ops.linear_cross_entropy, inputs, True, chunk_bytes=chunk_bytes, **options)
    torch_loss, torch_grads = run(plain, inputs, True, **options)
    exact_loss, exact_grads = run(plain, double(inputs), True, **options)
    assert_accurate(loss, torch_loss, exact_loss, torch.float32)
    for ours, theirs, exact in zip(grads, torch_grads, exact_grads, strict=True):
        assert_accurate(ours, theirs, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
# A third of the rows is ignored, and left out.
@pytest.mark.parametrize(
    ("rows", "classes"),
    [(300, 4300), (1000, 4300), (2000, 4300), (1000, 8500)],
    ids=["one chunk", "two chunks", "three", "two of many classes"],
)
def test_how_the_cpu_cuts_16_bit_logits(
    rows: int, classes: int, reduction: str, dtype: torch.dtype
) -> None:
    """Several tiles. Where 16-bit numbers are multiplied as such, the logits of few rows, or of few
    classes, are kept; others are made twice, or dW is added to."""
    inputs = make(rows, 5, classes, dtype, "cpu")
    loss, grads = run(ops.linear_cross_entropy, inputs, True, reduction=reduction)
    torch_loss, torch_grads = run(plain, inputs, True, reduction=reduction)
    exact_loss, exact_grads = run(plain, double(inputs), True, reduction=reduction)
    assert_accurate(loss, torch_loss, exact_loss, torch.float32)
    for ours, theirs, exact in zip(grads, torch_grads, exact_grads, strict=True):
        assert_accurate(ours, theirs, exact, dtype)


def test_an_incoming_gradient_scales_what_is_rounded_already(backend: Any) -> None:
    def scaled(function: Any) -> Any:
        return lambda *args, **options: 0.3 * function(*args, **options)  # no power of two

    inputs = make(90, 8, 50, torch.bfloat16, backend.device)
    _, grads = run(scaled(ops.linear_cross_entropy), inputs, True)
    _, torch_grads = run(scaled(plain), inputs, True)
    _, exact_grads = run(scaled(plain), double(inputs), True)
    for ours, theirs, exact in zip(grads, torch_grads, exact_grads, strict=True):
        assert_accurate(ours, theirs, exact, torch.bfloat16)


def test_the_gradient_of_a_bfloat16_weight_is_made_in_bfloat16(backend: Any) -> None:
    """In float32 it would be the largest tensor there is."""
    inputs = make(9, 4, 50, torch.bfloat16, backend.device)
    tensors = (inputs["hidden"], inputs["weight"], inputs["target"], None, None)
    options = (-100, 1, 0.0, 0.0, 0.0, False, False, True, True, False)  # mean; no bias
    for chunk_bytes in (0, 9 * 16 * 6):
        forward = backend.ops.linear_cross_entropy_forward
        *_, dhidden, dweight, _ = forward(*tensors, *options, chunk_bytes)
        assert dweight.dtype == torch.bfloat16
        assert dhidden.dtype == torch.float32
