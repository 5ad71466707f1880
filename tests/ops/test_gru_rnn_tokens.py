"""ops.gru and ops.rnn reading tokens: what they give for one-hot vectors, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hidden_cases import CELLS, exact, make, ours, theirs
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from recurrent import DTYPES, compare, run, some_lengths

pytestmark = pytest.mark.parametrize("cell", CELLS)

#: T, B, V, H
SHAPES = [(1, 1, 1, 1), (3, 2, 5, 7), (9, 17, 4, 40), (2, 3, 11, 129)]
TINY_SHAPES = [(1, 1, 1, 1), (3, 2, 5, 7), (4, 9, 4, 13), (2, 2, 11, 37)]


def one_hot(function: Any) -> Any:
    """`function` of one-hot vectors in place of the tokens."""

    def forward(tokens: Tensor, h0: Tensor, w_ih: Tensor, *rest: Tensor) -> Any:
        x = F.one_hot(tokens.long(), w_ih.shape[1]).to(w_ih.dtype)
        return function(x, h0, w_ih, *rest)

    return forward


def tokens_of(
    cell: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, **options: Any
) -> list[Any]:
    """tokens, then what `make` gives for floating input."""
    T, B, V, _ = shape
    tensors: list[Any] = make(cell, shape, dtype, device, **options)
    tensors[2] = tensors[2].t().contiguous().t()  # as a table of V rows
    return [torch.randint(V, (T, B), device=device), *tensors[1:]]


@pytest.mark.parametrize("size", range(len(SHAPES)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_torch(backend: Any, cell: str, dtype: torch.dtype, size: int) -> None:
    shape = (TINY_SHAPES if backend.tiny else SHAPES)[size]
    compare(
        *(ours(cell), one_hot(theirs(cell)), exact(cell)),
        lambda: tokens_of(cell, shape, dtype, backend.device),
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lengths(backend: Any, cell: str, dtype: torch.dtype, state: bool, reverse: bool) -> None:
    lengths = some_lengths(6, 5, backend.device)
    given: dict[str, Any] = {"reverse": reverse, "lengths": lengths}
    compare(
        *(ours(cell, **given), one_hot(theirs(cell, **given)), exact(cell, **given)),
        lambda: tokens_of(cell, (5, 6, 4, 7), dtype, backend.device, state=state),
    )


def test_padding_is_never_read(backend: Any, cell: str) -> None:
    """What stands there may be no token at all."""
    tensors = tokens_of(cell, (5, 3, 4, 6), torch.float64, backend.device)
    lengths = torch.tensor([2, 0, 5], device=backend.device)
    function = ours(cell, lengths=lengths)
    expected = run(function, tensors)
    padding = torch.arange(5, device=backend.device).unsqueeze(-1) >= lengths
    changed = [tensors[0].masked_fill(padding, -100), *tensors[1:]]
    for actual, truth in zip(run(function, changed), expected, strict=True):
        assert torch.equal(actual, truth)


def test_derivatives(backend: Any, cell: str) -> None:
    tensors = tokens_of(cell, (3, 2, 3, 4), torch.float64, backend.device)
    lengths = torch.tensor([2, 3], device=backend.device)
    variants: list[dict[str, Any]] = [{}, {"lengths": lengths, "reverse": True}]
    if cell == "gru":
        variants.append({"lengths": lengths, "recompute": True})
    leaves = [t.requires_grad_() for t in tensors[1:]]
    for options in variants:
        call = ours(cell, **options)
        function = lambda *t, call=call: call(tensors[0], *t)  # noqa: E731
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend: Any, cell: str, dtype: torch.dtype) -> None:
    raw: Any = backend.ops
    tensors = tokens_of(cell, (3, 2, 4, 5), dtype, backend.device)
    if cell == "gru":
        output, h_n, gates, u_n = raw.gru_forward(*tensors, None, False, True)
        grads = (torch.ones_like(output), torch.ones_like(h_n))
        arguments = (*grads, *tensors[:4], None, output, gates, u_n, True, False, 62)
        opcheck(raw.gru_backward.default, arguments)
        options: tuple[bool, ...] = (False, True)
    else:
        options = (False, cell == "relu")
        output, h_n = raw.rnn_forward(*tensors, None, *options)
        grads = (torch.ones_like(output), torch.ones_like(h_n))
        opcheck(raw.rnn_backward.default, (*grads, *tensors[:4], None, output, *options, 30))
    leaves = [t if i == 0 else t.requires_grad_() for i, t in enumerate(tensors)]
    opcheck(getattr(raw, "gru" if cell == "gru" else "rnn").default, (*leaves, None, *options))


def test_compile_fullgraph(backend: Any, cell: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(ours(cell), fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (4, 6):
        tensors = tokens_of(cell, (T, 3, 5, 6), torch.float32, backend.device)
        for actual, expected in zip(run(compiled, tensors), run(ours(cell), tensors), strict=True):
            torch.testing.assert_close(actual, expected)


def test_tokens_out_of_range(cell: str) -> None:
    tensors = tokens_of(cell, (4, 3, 5, 6), torch.float32, "cpu")
    tensors[0][2, 1] = 5
    with pytest.raises(ValueError, match=r"input must be in \[0, 5\), got 5 at \[2, 1\]"):
        ours(cell)(*tensors)
