"""Recurrent modules reading tokens by an embedding: as with the rows looked up before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recurrent_modules import Unpacked, assert_same, flat, gradients
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.profiler import profile

import seqkern

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False, "num_layers": 2},
    "batch-first": {"batch_first": True},
    "both": {"bidirectional": True, "num_layers": 2, "batch_first": True},
}
KINDS = ["LSTM", "GRU", "RNN"]
#: Rows of the embedding: fewer than the 20 tokens of a call, and more.
ROWS = [3, 50]


def make(device: str, V: int, kind: str = "LSTM", **options: Any) -> tuple[Any, Tensor, Tensor]:
    """A module 5 -> 7 in float64, tokens [4, 5] and an embedding [V, 5]."""
    module = getattr(seqkern.nn, kind)(5, 7, **options).to(device, torch.float64)
    tokens = torch.randint(V, (4, 5), device=device)
    return module, tokens, torch.randn(V, 5, dtype=torch.float64, device=device)


def both(module: Any, tokens: Tensor, embedding: Tensor, **options: Any) -> list[list[Tensor]]:
    """Outputs and gradients by tokens, and by looked up rows."""
    by_tokens = lambda m, e: m(tokens, embedding=e, **options)  # noqa: E731
    by_rows = lambda m, e: m(F.embedding(tokens.clamp(0), e), **options)  # noqa: E731
    return [gradients(Unpacked(module, f), None, embedding) for f in (by_tokens, by_rows)]


@pytest.mark.parametrize("V", ROWS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_rows(backend: Any, kind: str, options: dict[str, Any], V: int) -> None:
    assert_same(*both(*make(backend.device, V, kind, **options)))


def test_projection(backend: Any) -> None:
    options: dict[str, Any] = {"bidirectional": True, "num_layers": 2, "proj_size": 3}
    assert_same(*both(*make(backend.device, 3, **options)))


@pytest.mark.parametrize("V", ROWS)
def test_a_table_is_made_of_few_rows(V: int) -> None:
    module, tokens, embedding = make("cpu", V)
    with profile() as profiler:
        module(tokens, embedding=embedding)
    looked_up = any(event.key == "aten::embedding" for event in profiler.key_averages())
    assert looked_up == (V == 50)


@pytest.mark.parametrize("V", ROWS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths_with_anything_in_the_padding(
    backend: Any, kind: str, bidirectional: bool, V: int
) -> None:
    module, tokens, embedding = make(backend.device, V, kind, bidirectional=bidirectional)
    lengths = torch.tensor([2, 4, 0, 1, 3], device=backend.device)
    tokens[torch.arange(4, device=backend.device)[:, None] >= lengths] = -100
    assert_same(*both(module, tokens, embedding, lengths=lengths))


@pytest.mark.parametrize("V", ROWS)
def test_packed_sequences(backend: Any, V: int) -> None:
    module, tokens, embedding = make(backend.device, V)
    packed = pack_padded_sequence(tokens, torch.tensor([2, 4, 1, 1, 3]), enforce_sorted=False)
    rows = packed._replace(data=F.embedding(packed.data, embedding))
    found, expected = module(packed, embedding=embedding), module(rows)
    assert_same(flat((found[0].data, found[1])), flat((expected[0].data, expected[1])))


@pytest.mark.parametrize("V", [2, 50])
def test_unbatched(backend: Any, V: int) -> None:
    module, tokens, embedding = make(backend.device, V)
    assert_same(*both(module, tokens[:, 0], embedding))


@pytest.mark.parametrize("V", ROWS)
def test_autocast(backend: Any, V: int) -> None:
    module, tokens, embedding = make(backend.device, V)
    module, embedding = module.float(), embedding.float().requires_grad_()
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        output, _ = module(tokens, embedding=embedding)
    assert output.dtype == torch.bfloat16
    expected = module(tokens, embedding=embedding)[0]
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.02)
    output.float().sum().backward()
    assert embedding.grad is not None
    assert embedding.grad.dtype == torch.float32


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("V", ROWS)
def test_compile_fullgraph(backend: Any, V: int, dynamic: bool) -> None:
    module, tokens, embedding = make(backend.device, V, bidirectional=True)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for some in (tokens, tokens[:3], tokens[:, :2]):
        assert_same(
            flat(compiled(some, embedding=embedding)), flat(module(some, embedding=embedding))
        )


@pytest.mark.parametrize("V", ROWS)
def test_export_with_dynamic_batch_and_time(backend: Any, V: int) -> None:
    module, tokens, embedding = make(backend.device, V)
    sizes = {0: torch.export.Dim("T", min=2, max=64), 1: torch.export.Dim("B", min=2, max=64)}
    program = torch.export.export(
        module,
        (tokens,),
        {"embedding": embedding},
        dynamic_shapes={"input": sizes, "embedding": None},
    )
    other = torch.randint(V, (9, 6), device=backend.device)
    found = program.module()(other, embedding=embedding)
    assert_same(flat(found), flat(module(other, embedding=embedding)))


BAD_CALLS: dict[str, tuple[Any, str]] = {
    "dim": (
        lambda m, t, e: m(t[None], embedding=e),
        r"LSTM: input must have 1 or 2 dimensions with embedding, got \[1, 4, 5\]",
    ),
    "dtype": (
        lambda m, t, e: m(t.double(), embedding=e),
        "LSTM: input must be int64 or int32 with embedding, got torch.float64",
    ),
    "embedding": (
        lambda m, t, e: m(t, embedding=e[:, :4]),
        r"LSTM: embedding must be \[V, 5\], got \[3, 4\]",
    ),
    "embedding-dtype": (
        lambda m, t, e: m(t, embedding=e.float()),
        "LSTM: embedding must be torch.float64 like the weights, got torch.float32",
    ),
    "no-embedding": (
        lambda m, t, e: m(t),
        r"LSTM: input must be floating point, or have an embedding, got torch.int64",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(backend: Any, name: str) -> None:
    call, text = BAD_CALLS[name]
    with pytest.raises(ValueError, match=text):
        call(*make(backend.device, 3))


def test_a_token_out_of_range() -> None:
    module, tokens, embedding = make("cpu", 3)
    tokens[1, 2] = 3
    with pytest.raises(ValueError, match=r"input must be in \[0, 3\), got 3 at \[1, 2\]"):
        module(tokens, embedding=embedding)
