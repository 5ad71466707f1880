"""`seqkern.accelerate`: what ours takes agrees with torch, what it does not take is torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import ATTENTION, CELL, CLASSES, CROSS_ENTROPY, LINEAR, LSTM, both, randn
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import seqkern
from seqkern.dropin import conditions


@pytest.fixture(autouse=True)
def _twenty_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("softmax", "log_softmax"):
        monkeypatch.setitem(conditions.LARGE, name, 20)


def lstm(x: Tensor, *hx: Tensor, **options: Any) -> Any:
    torch.manual_seed(1)
    return torch.nn.LSTM(5, 7, dtype=x.dtype, **options)(x, hx or None)


def rnn(x: Tensor, **options: Any) -> Any:
    torch.manual_seed(1)
    return torch.nn.RNN(5, 7, dtype=x.dtype, **options)(x)


def packed(x: Tensor) -> Any:
    torch.manual_seed(1)
    sequence = pack_padded_sequence(x, torch.tensor([3, 1]))
    return torch.nn.LSTM(5, 7, dtype=x.dtype)(sequence)[0].data


def cell(x: Tensor, *hx: Tensor) -> Any:
    torch.manual_seed(1)
    return torch.nn.LSTMCell(5, 7, dtype=x.dtype)(x, hx or None)


def hidden(kind: str, x: Tensor, h: Tensor) -> Any:
    torch.manual_seed(1)
    return getattr(torch.nn, kind)(5, 7, 2, dtype=x.dtype)(x, h)


def attention(*qkv: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(*qkv, is_causal=True, **options)


TAKEN: dict[str, tuple[str, Callable[..., Any], list[Tensor]]] = {
    "cross-entropy": (CROSS_ENTROPY, lambda x: F.cross_entropy(x, CLASSES), [randn(4, 9)]),
    "cross-entropy-options": (
        CROSS_ENTROPY,
        lambda x: F.cross_entropy(
            x, CLASSES, torch.arange(9).to(x.dtype), reduction="sum", label_smoothing=0.1
        ),
        [randn(4, 9)],
    ),
    "cross-entropy-sequences": (
        CROSS_ENTROPY,
        lambda x: F.cross_entropy(x, CLASSES.view(2, 2), reduction="none"),
        [randn(2, 9, 2)],
    ),
    "cross-entropy-probabilities": (
        CROSS_ENTROPY,
        lambda x, y: F.cross_entropy(x, y.abs() / y.abs().sum(-1, True)),
        [randn(4, 9), randn(4, 9)],
    ),
    "cross-entropy-one-row": (CROSS_ENTROPY, lambda x: F.cross_entropy(x, CLASSES[0]), [randn(9)]),
    "cross-entropy-module": (
        CROSS_ENTROPY,
        lambda x: torch.nn.CrossEntropyLoss()(x, CLASSES),
        [randn(4, 9)],
    ),
    "attention": (ATTENTION, attention, [randn(2, 4, 6, 8) for _ in range(3)]),
    "attention-scale": (
        ATTENTION,
        lambda *qkv: attention(*qkv, scale=0.3),
        [randn(2, 4, 6, 8) for _ in range(3)],
    ),
    "attention-gqa": (
        ATTENTION,
        lambda *qkv: attention(*qkv, enable_gqa=True),
        [randn(2, 4, 6, 8), randn(2, 2, 6, 8), randn(2, 2, 6, 8)],
    ),
    "linear": (
        LINEAR,
        lambda x, w: F.linear_cross_entropy(x, w, CLASSES, label_smoothing=0.1),
        [randn(4, 5), randn(9, 5)],
    ),
    "linear-bias": (
        LINEAR,
        lambda x, w, b: F.linear_cross_entropy(x, w, CLASSES, linear_bias=b),
        [randn(4, 5), randn(9, 5), randn(9)],
    ),
    "softmax": ("torch.softmax", lambda x: torch.softmax(x, -1), [randn(3, 9)]),
    "softmax-method": ("torch.Tensor.softmax", lambda x: x.softmax(dim=1), [randn(3, 9)]),
    "softmax-functional": ("torch.Tensor.softmax", lambda x: F.softmax(x, -1), [randn(3, 9)]),
    "log-softmax": (
        "torch.Tensor.log_softmax",
        lambda x: torch.nn.LogSoftmax(-1)(x),
        [randn(3, 9)],
    ),
    "lstm": (LSTM, lstm, [randn(3, 2, 5)]),
    "lstm-state": (LSTM, lstm, [randn(3, 2, 5), randn(1, 2, 7), randn(1, 2, 7)]),
    "lstm-projected": (
        LSTM,
        lambda x, *hx: lstm(x, *hx, proj_size=3, bidirectional=True, batch_first=True),
        [randn(2, 3, 5), randn(2, 2, 3), randn(2, 2, 7)],
    ),
    "lstm-unbatched": (LSTM, lambda x: lstm(x, num_layers=2, bias=False), [randn(3, 5)]),
    "lstm-packed": (LSTM, packed, [randn(3, 2, 5)]),
    "cell": (CELL, cell, [randn(2, 5), randn(2, 7), randn(2, 7)]),
    "cell-unbatched": (CELL, cell, [randn(5)]),
}
for kin in ("GRU", "RNN"):
    if hasattr(seqkern.nn, kin):
        TAKEN[kin.lower()] = (
            f"torch.nn.{kin}",
            lambda x, h, kin=kin: hidden(kin, x, h),
            [randn(3, 2, 5), randn(2, 2, 7)],
        )
if not hasattr(F, "linear_cross_entropy"):
    TAKEN = {name: case for name, case in TAKEN.items() if case[0] != LINEAR}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("function", "call", "tensors"), TAKEN.values(), ids=TAKEN)
def test_ours_takes_it_and_agrees(
    function: str, call: Callable[..., Any], tensors: list[Tensor], dtype: torch.dtype
) -> None:
    ours, theirs, counts = both(call, *(torch.randn_like(t).to(dtype) for t in tensors))
    assert counts[function, ""] == 1
    assert not any(reason for _, reason in counts)  # a gradient of ours may call a softmax
    for actual, expected in zip(ours, theirs, strict=True):
        # Of the largest element: both round, and some elements are small differences.
        scale = expected.abs().max().item()
        atol = 8 * torch.finfo(dtype).eps * scale
        torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


LEFT: dict[str, tuple[str, str, Callable[..., Any], list[Tensor]]] = {
    "mask": (
        ATTENTION,
        "an attention mask",
        lambda *qkv: F.scaled_dot_product_attention(*qkv, attn_mask=torch.ones(6, 6).tril().bool()),
        [randn(2, 4, 6, 8) for _ in range(3)],
    ),
    "not-causal": (
        ATTENTION,
        "not causal",
        F.scaled_dot_product_attention,
        [randn(2, 4, 6, 8) for _ in range(3)],
    ),
    "top-left": (
        ATTENTION,
        "another number of keys than queries",
        attention,
        [randn(2, 4, 3, 8), randn(2, 4, 6, 8), randn(2, 4, 6, 8)],
    ),
    "three-dimensions": (ATTENTION, "not 4 dimensions", attention, [randn(2, 6, 8)] * 3),
    "wide": (
        ATTENTION,
        "heads wider than 256, or of different widths",
        attention,
        [randn(1, 1, 2, 257)] * 3,
    ),
    "broadcast-heads": (
        ATTENTION,
        "arguments that do not fit",
        attention,
        [randn(2, 4, 6, 8), randn(2, 1, 6, 8), randn(2, 1, 6, 8)],
    ),
    "reduce": (
        CROSS_ENTROPY,
        "the deprecated size_average or reduce",
        lambda x: F.cross_entropy(x, CLASSES, reduce=False),
        [randn(4, 9)],
    ),
    "no-rows": (
        CROSS_ENTROPY,
        "nothing in it",
        lambda x: F.cross_entropy(x, CLASSES[:0], reduction="sum"),
        [randn(0, 9)],
    ),
    "class-weights": (
        CROSS_ENTROPY,
        "gradient of the class weights",
        lambda x, p, w: F.cross_entropy(x, p, w),
        [randn(4, 9), randn(4, 9).softmax(-1), randn(9)],
    ),
    "softmax-dimension": (
        "torch.Tensor.softmax",
        "another dimension than the last",
        lambda x: F.softmax(x, 0),
        [randn(3, 9)],
    ),
    "softmax-dtype": (
        "torch.Tensor.log_softmax",
        "another dtype asked for",
        lambda x: F.log_softmax(x, -1, dtype=torch.float32),
        [randn(3, 9)],
    ),
    "softmax-small": (
        "torch.softmax",
        "fewer than 20 elements, where torch's is faster",
        lambda x: torch.softmax(x, -1),
        [randn(3, 4)],
    ),
    "rnn-step": (
        "torch.nn.RNN",
        "a small single step of an RNN, where torch's is faster",
        lambda x: rnn(x),
        [randn(1, 2, 5)],
    ),
    "kept-weights": (
        LSTM,
        "weights that are not the module's attributes",
        lambda x: exchanged()(x),
        [randn(3, 2, 5)],
    ),
}


def exchanged() -> torch.nn.LSTM:
    torch.manual_seed(1)
    module = torch.nn.LSTM(5, 7, dtype=torch.float64)
    module._flat_weights = [w.detach() * 2 for w in module._flat_weights]
    return module


@pytest.mark.filterwarnings("ignore:size_average:UserWarning")
@pytest.mark.parametrize(("function", "reason", "call", "tensors"), LEFT.values(), ids=LEFT)
def test_torch_takes_it_exactly(
    function: str, reason: str, call: Callable[..., Any], tensors: list[Tensor]
) -> None:
    if call is F.scaled_dot_product_attention:  # looked up when called

        def call(*qkv: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*qkv)

    ours, theirs, counts = both(call, *tensors)
    assert counts == {(function, reason): 1}
    for actual, expected in zip(ours, theirs, strict=True):
        assert torch.equal(actual, expected)


WRONG: dict[str, Callable[[], Any]] = {
    "target-shape": lambda: F.cross_entropy(randn(4, 9), CLASSES[:3]),
    "target-dtype": lambda: F.cross_entropy(randn(4, 9), CLASSES.int()),
    "no-target": lambda: F.cross_entropy(randn(4, 9)),  # type: ignore[call-arg]
    "smoothing": lambda: F.cross_entropy(randn(4, 9), CLASSES, label_smoothing=2.0),
    "reduction": lambda: F.cross_entropy(randn(4, 9), CLASSES, reduction="avg"),
    "integers": lambda: F.cross_entropy(CLASSES[None], CLASSES[:1]),
    "dtypes": lambda: attention(randn(1, 1, 2, 4), randn(1, 1, 2, 4).float(), randn(1, 1, 2, 4)),
    "widths": lambda: attention(randn(1, 1, 2, 4), randn(1, 1, 2, 3), randn(1, 1, 2, 4)),
    "lstm-width": lambda: lstm(randn(3, 2, 6)),
    "lstm-state": lambda: lstm(randn(3, 2, 5), randn(1, 2, 7)),
    "lstm-dtype": lambda: torch.nn.LSTM(5, 7)(randn(3, 2, 5)),
    "cell-width": lambda: cell(randn(2, 4)),
    "cell-state": lambda: cell(randn(2, 5), randn(3, 7), randn(3, 7)),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_mistakes_are_torchs(call: Callable[[], Any]) -> None:
    def error() -> tuple[type[BaseException], str]:
        with pytest.raises(Exception) as caught:  # noqa: PT011 (both are compared)
            call()
        return caught.type, str(caught.value)

    plain = error()
    with seqkern.accelerate():
        assert error() == plain


def test_few_logits_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(conditions.LARGE, "cross_entropy", 40)
    monkeypatch.setattr(conditions, "MANY_ROWS", 6)
    reason = "fewer than 40 logits in few rows, where torch's is faster"
    for shape, why in {
        (4, 9): reason,
        (5, 2): reason,
        (1, 2, 5): reason,
        (5, 9): "",
        (6, 2): "",
        (2, 2, 3): "",
    }.items():
        target = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
        *_, counts = both(lambda x, y=target: F.cross_entropy(x, y), randn(*shape))
        assert counts == {(CROSS_ENTROPY, why): 1}


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (randn(2, 2, 5), {}),
        (randn(1, 2, 5), {"batch_first": True}),
        (randn(1, 2, 5).bfloat16(), {}),
        (randn(3, 5), {"batch_first": True}),
        (randn(1, 50_000, 5), {}),
    ],
    ids=["steps", "batch-first", "bfloat16", "unbatched", "rows"],
)
def test_more_than_a_small_step_of_an_rnn_is_ours(x: Tensor, options: dict[str, Any]) -> None:
    *_, counts = both(lambda x: rnn(x, **options), x)
    assert counts == {("torch.nn.RNN", ""): 1}
