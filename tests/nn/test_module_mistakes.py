"""What modules say of wrong arguments: one line, and what torch's modules refuse, ours refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mistakes import refused
from seqkern import nn

RECURRENT = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
PAIRS = ("LSTM", "LSTMCell")
PAIR = r"hx must be a pair \(h, c\) of tensors or None, got"


def modules(name: str, device: str = "cpu") -> tuple[Any, Any, Tensor, Tensor]:
    """Ours and torch's of one state_dict, an input and a state h."""
    ours = getattr(nn, name)(5, 2).to(device)
    theirs = getattr(torch.nn, name)(5, 2).to(device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 5, device=device)
    h = torch.randn(1, 3, 2, device=device)
    return ours, theirs, *((x[0], h[0]) if name in CELLS else (x, h))


#: For modules whose state is a pair: what is given for hx, the error and what it says was given.
WRONG_PAIRS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "tensor": (lambda h: h, TypeError, r"float32 \[(1, )?3, 2\]"),
    "two-in-one": (lambda h: torch.stack([h, h]), TypeError, r"float32 \[2, "),
    "none": (lambda h: (), ValueError, "tuple of 0"),
    "one": (lambda h: (h,), ValueError, "tuple of 1"),
    "three": (lambda h: (h, h, h), ValueError, "tuple of 3"),
    "three-in-a-list": (lambda h: [h, h, h], ValueError, "list of 3"),
    "None-inside": (lambda h: (h, None), TypeError, r"float32 \[.*\], None$"),
    "number": (lambda h: 0, TypeError, "0$"),
    "array": (lambda h: h.cpu().numpy(), TypeError, "ndarray$"),
}
WRONG_STATES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "pair": (lambda h: (h, h), TypeError, "tuple of 2"),
    "one": (lambda h: (h,), TypeError, "tuple of 1"),
    "list": (lambda h: [h], TypeError, "list of 1"),
    "none": (lambda h: (), TypeError, "tuple of 0"),
    "number": (lambda h: 0, TypeError, "0$"),
}


@pytest.mark.parametrize("case", WRONG_PAIRS)
@pytest.mark.parametrize("name", PAIRS)
def test_states_that_are_no_pair(backend: Any, name: str, case: str) -> None:
    ours, theirs, x, h = modules(name, backend.device)
    make, error, message = WRONG_PAIRS[case]
    refused(lambda: ours(x, make(h)), error, f"{name}: {PAIR} {message}")
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is in torch's words
        theirs(x, make(h))


@pytest.mark.parametrize("case", WRONG_STATES)
@pytest.mark.parametrize("name", ["GRU", "RNN", "GRUCell", "RNNCell"])
def test_states_that_are_no_tensor(backend: Any, name: str, case: str) -> None:
    ours, theirs, x, h = modules(name, backend.device)
    make, error, message = WRONG_STATES[case]
    refused(lambda: ours(x, make(h)), error, f"{name}: hx must be a tensor or None, got {message}")
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is in torch's words
        theirs(x, make(h))


@pytest.mark.parametrize("name", PAIRS)
def test_a_list_is_a_pair(backend: Any, name: str) -> None:
    ours, theirs, x, h = modules(name, backend.device)
    for found, expected in zip(ours(x, [h, 2 * h])[:1], theirs(x, [h, 2 * h])[:1], strict=True):
        torch.testing.assert_close(found, expected)


ROWS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    **{
        f"{name}-input": (
            lambda name=name: modules(name)[0](None),
            TypeError,
            rf"{name}: input must be a tensor( or a PackedSequence)?, got None$",
        )
        for name in (*RECURRENT, *CELLS)
    },
    **{
        f"{name}-lengths": (
            lambda name=name: modules(name)[0](modules(name)[2], lengths=[1, 2, 3]),
            TypeError,
            "(LSTM|GRU|RNN|lstm): lengths must be a tensor or None, got list of 3$",
        )
        for name in RECURRENT
    },
    **{
        f"{name}-embedding": (
            lambda name=name: modules(name)[0](
                torch.zeros(4, 3, dtype=torch.int64), embedding=torch.nn.Embedding(9, 5)
            ),
            TypeError,
            f"{name}: embedding must be a tensor or None, got Embedding; pass its weight$",
        )
        for name in RECURRENT
    },
    "embedding-array": (
        lambda: nn.LSTM(5, 2)(torch.zeros(4, 3).long(), embedding=np.zeros((9, 5))),
        TypeError,
        "LSTM: embedding must be a tensor or None, got ndarray$",
    ),
    "attention-2d": (
        lambda: nn.CausalSelfAttention(8, 2)(torch.zeros(3, 8)),
        ValueError,
        r"CausalSelfAttention: x must be \[B, T, 8\], got float32 \[3, 8\]$",
    ),
    "attention-width": (
        lambda: nn.CausalSelfAttention(8, 2)(torch.zeros(1, 3, 7)),
        ValueError,
        r"CausalSelfAttention: x must be \[B, T, 8\], got float32 \[1, 3, 7\]$",
    ),
    "attention-dtype": (
        lambda: nn.CausalSelfAttention(8, 2)(torch.zeros(1, 3, 8).double()),
        ValueError,
        r"CausalSelfAttention: x must be float32 like the weights, got float64 \[1, 3, 8\]$",
    ),
    "attention-None": (
        lambda: nn.CausalSelfAttention(8, 2)(None),
        TypeError,
        "CausalSelfAttention: x must be a tensor, got None$",
    ),
    "attention-lengths": (
        lambda: nn.CausalSelfAttention(8, 2)(torch.zeros(1, 3, 8), [3]),
        TypeError,
        "(CausalSelfAttention|attention): lengths must be a tensor or None, got list of 1$",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ROWS.values(), ids=ROWS)
def test_mistakes(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    refused(call, error, message)


CONSTRUCTED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"window": 0}, ValueError, "window must be at least 1 or None, got 0$"),
    ({"window": 2.5}, TypeError, "window must be an integer or None, got 2.5$"),
    ({"head_dim": 0}, ValueError, "head_dim must be from 1 to 256, got 0$"),
    ({"head_dim": 300}, ValueError, "head_dim must be from 1 to 256, got 300$"),
    ({"embed_dim": 1024, "num_heads": 2}, ValueError, "head_dim must be from 1 to 256, got 512$"),
    ({"embed_dim": 0}, ValueError, "embed_dim must be at least 1, got 0$"),
    ({"embed_dim": -4}, ValueError, "embed_dim must be at least 1, got -4$"),
    ({"embed_dim": "8"}, TypeError, "embed_dim must be an integer, got '8'$"),
    ({"softcap": -1.0}, ValueError, "softcap must be at least 0 and finite, got -1.0$"),
    ({"softcap": float("nan")}, ValueError, "softcap must be at least 0 and finite, got nan$"),
    ({"softcap": float("inf")}, ValueError, "softcap must be at least 0 and finite, got inf$"),
    ({"softcap": None}, TypeError, "softcap must be a number, got None$"),
    ({"scale": float("nan")}, ValueError, "scale must be a number, got nan$"),
    ({"dropout": float("nan")}, ValueError, r"dropout must be in \[0, 1\), got nan$"),
    ({"num_heads": None}, TypeError, "num_heads must be an integer, got None$"),
]


@pytest.mark.parametrize(("changed", "error", "message"), CONSTRUCTED)
def test_attention_is_refused_when_made(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    given: Any = {"embed_dim": 8, "num_heads": 2} | changed
    refused(lambda: nn.CausalSelfAttention(**given), error, f"CausalSelfAttention: {message}")


@pytest.mark.parametrize("T", [1, 8], ids=["rows", "table"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("token", [-1, 3, 2**40])
@pytest.mark.parametrize("name", RECURRENT)
def test_a_token_that_is_no_row(name: str, token: int, batch_first: bool, T: int) -> None:
    """In the same words whether rows are looked up, for few tokens, or a table of products is."""
    module = getattr(nn, name)(5, 2, batch_first=batch_first)
    tokens = torch.randint(3, (4, T) if batch_first else (T, 4))
    place = (2, T - 1) if batch_first else (T - 1, 2)
    tokens[place] = token
    refused(
        lambda: module(tokens, embedding=torch.randn(3, 5)),
        ValueError,
        rf"{name}: input must be in \[0, 3\), got {token} at \[{place[0]}, {place[1]}\]$",
    )
    # What is padding is not looked at.
    lengths = torch.full((4,), T)
    lengths[2] = T - 1
    module(tokens, lengths=lengths, embedding=torch.randn(3, 5))
    lengths[0], tokens[0, 0] = T, 3
    refused(
        lambda: module(tokens, lengths=lengths, embedding=torch.randn(3, 5)),
        ValueError,
        rf"{name}: input must be in \[0, 3\), got 3 at \[0, 0\]$",
    )


def test_a_token_of_a_packed_sequence_that_is_no_row() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.tensor([0, 1, 7]), torch.tensor([2])])
    refused(
        lambda: nn.GRU(5, 2)(packed, embedding=torch.randn(3, 5)),
        ValueError,
        r"GRU: input must be in \[0, 3\), got 7 at \[3\]$",
    )


@pytest.mark.parametrize("name", [*RECURRENT, *CELLS])
def test_autocast_leaves_float64_alone(backend: Any, name: str) -> None:
    ours, theirs, x, h = (m.double() for m in modules(name, backend.device))
    state = (h, h) if "LSTM" in name else h
    with torch.autocast(backend.device, torch.bfloat16):
        for arguments in ((x,), (x, state)):
            found, expected = ours(*arguments), theirs(*arguments)
            for made, wanted in zip(flat(found), flat(expected), strict=True):
                assert made.dtype == wanted.dtype == torch.float64
                torch.testing.assert_close(made, wanted)
        made, wanted = (flat(m.float()(x.float()))[0] for m in (ours, theirs))
        assert made.dtype == wanted.dtype


@pytest.mark.parametrize("name", RECURRENT)
def test_autocast_leaves_a_float64_embedding_alone(name: str) -> None:
    module, tokens = getattr(nn, name)(5, 2).double(), torch.randint(3, (8, 4))
    embedding = torch.randn(3, 5, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = flat(module(tokens, embedding=embedding))
        expected = flat(module(embedding[tokens]))
        for made, wanted in zip(found, expected, strict=True):
            assert made.dtype == torch.float64
            torch.testing.assert_close(made, wanted)
        refused(
            lambda: module(tokens, embedding=embedding.float()),
            ValueError,
            f"{name}: embedding must be torch.float64 like the weights, got torch.float32$",
        )


def test_attention_of_float64_under_autocast() -> None:
    layer, x = nn.CausalSelfAttention(8, 2).double(), torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert torch.equal(found, layer(x))


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


@pytest.mark.parametrize("name", [*RECURRENT, *CELLS])
def test_input_unlike_the_weights(backend: Any, name: str) -> None:
    """Named as what is wrong, by dtype and by device; under autocast both are cast."""
    ours, theirs, x, _ = modules(name, backend.device)
    wrong = x.double()
    says = rf"{name}: input must be torch.float32 like the weights, got torch.float64"
    refused(lambda: ours(wrong), ValueError, says)
    with pytest.raises((RuntimeError, ValueError)):
        theirs(wrong)
    says = rf"{name}: input must be on {backend.device}(:\d)? like the weights, got one on meta"
    refused(lambda: ours(x.to("meta")), ValueError, says)
    with torch.autocast(x.device.type, torch.bfloat16):
        ours(x.bfloat16())
