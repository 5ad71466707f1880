"""Rows that diverge while tokens are drawn.

On the CPU `ops.sample` raises. On a GPU, where looking would stop the stream, it draws -1, as it
does in the emulator: nothing may look that up, and `generate` raises where it waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from seqkern.errors import UserError
from seqkern.generation import graph, loop
from seqkern.generation.sampler import Sampler
from seqkern.models import MODELS, ConditionalLanguageModel, DecoderConfig, build_model
from seqkern.ops import _registry

SIZES = {"vocab_size": 11, "context": 12, "hidden": 12, "layers": 1, "heads": 2}
ROW, NEW = 1, 3  # where a distribution is missing
MESSAGE = f"finite maximum and no NaN in each row, got others in row {ROW} for new token {NEW}$"


@pytest.fixture
def on_device(emulator_library: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The emulator's kernels draw as a GPU's do, and generation believes that nobody has looked."""
    monkeypatch.setattr(Sampler, "looking_device", "nowhere")
    with _registry.use_namespace("seqkern_emu"):
        yield


def diverging(name: str, monkeypatch: pytest.MonkeyPatch, rows: Any = ROW) -> Any:
    """A model whose row 1 (or `rows`) has no distribution from the 4th new token on."""
    torch.manual_seed(0)
    model = build_model(name, SIZES)
    read = 0

    def spoil(logits: Tensor, tokens: Tensor) -> Tensor:
        assert (tokens >= 0).all(), "a token was looked up that does not exist"
        nonlocal read
        read += tokens.shape[1]
        out = logits.clone()
        if read >= 2 + NEW:
            out[rows] = torch.nan
        return out

    for method in ("next_logits", "step_logits"):
        plain = getattr(model, method)

        def call(tokens: Tensor, *args: Any, plain: Any = plain, **options: Any) -> Any:
            logits, state = plain(tokens, *args, **options)
            return spoil(logits, tokens), state

        monkeypatch.setattr(model, method, call)
    return model


@pytest.mark.parametrize("options", [{}, {"temperature": 0, "presence_penalty": 0.5}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_generate_raises(
    on_device: None, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    model = diverging(name, monkeypatch)
    prompt = torch.randint(11, (3, 2))
    with pytest.raises(UserError, match=MESSAGE):
        model.generate(prompt, 8, seed=0, **options)


def test_stream_raises_before_the_token_is_shown(
    on_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = diverging("lstm", monkeypatch)
    shown: list[Tensor] = []
    with pytest.raises(UserError, match=MESSAGE):
        model.generate(torch.randint(11, (3, 2)), 8, on_token=shown.append)
    assert len(shown) == NEW


def test_a_row_that_had_ended_may_diverge(on_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays in the batch for a while, and what it would have drawn is left out."""
    model = diverging("lstm", monkeypatch)
    prompt = torch.randint(11, (3, 2))
    first = build_model("lstm", SIZES)
    first.load_state_dict(model.state_dict())
    stop = int(first.generate(prompt, 1, temperature=0)[ROW, -1])
    monkeypatch.setattr(loop, "_STEPS_PER_LOOK", 100)
    tokens = model.generate(prompt, 8, temperature=0, stop_tokens=[stop])
    assert tokens[ROW, 2] == stop


def test_a_draft_and_its_model_raise(on_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, draft = diverging("gpt", monkeypatch, slice(None)), build_model("lstm", SIZES)
    with pytest.raises(UserError, match="finite maximum and no NaN in each row, got others in row"):
        model.generate(torch.randint(11, (3, 2)), 8, draft=draft, draft_tokens=2)


@pytest.mark.parametrize("options", [{}, {"temperature": 0}], ids=str)
def test_penalties_that_leave_nothing_raise_with_a_draft(
    on_device: None, options: dict[str, Any]
) -> None:
    """The model's own logits are finite, and so are the log-probabilities under it."""
    torch.manual_seed(0)
    model, draft = build_model("gpt", SIZES), build_model("lstm", SIZES)
    prompt = torch.arange(10).repeat(2, 1)  # the first new token is the last that is left
    with pytest.raises(UserError, match=r"got others in row 0 for new token 1$"):
        model.generate(prompt, 4, seed=0, draft=draft, presence_penalty=1e300, **options)


def test_a_draft_that_diverges_raises(on_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the CPU."""
    model, draft = build_model("gpt", SIZES), diverging("lstm", monkeypatch, slice(None))
    with pytest.raises(UserError, match="got others in row 0 for new token"):
        model.generate(torch.randint(11, (3, 2)), 8, seed=0, draft=draft, draft_tokens=2)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"presence_penalty": 0.5}], ids=str)
def test_a_model_that_diverges_beside_a_draft_is_a_user_error_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    model, draft = diverging("lstm", monkeypatch), build_model("lstm", SIZES)
    prompt = torch.randint(11, (3, 2))
    with pytest.raises(UserError, match=f"finite maximum and no NaN .* row {ROW}"):
        model.generate(prompt, 8, seed=0, draft=draft, draft_tokens=4, **options)


def test_the_captured_step_goes_on(on_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a graph nobody can look, so every replay reads a token that exists."""
    model = diverging("lstm", monkeypatch)
    prompt = torch.randint(11, (3, 2))
    sampler = Sampler(loop.Sampling(), torch.arange(3), None)
    logits, state = model.next_logits(prompt)
    token, _ = sampler.draw(logits, 0)
    steps = graph.StepGraph(
        *(model, state, sampler, token, 1),
        capture=lambda step, device: step,
        warm_up=lambda step, device: None,
    )
    drawn = [steps.replay() for _ in range(6)]
    assert all((tokens >= 0).all() for tokens, _ in drawn)
    assert drawn[-1][1].isnan().tolist() == [False, True, False]


def test_a_conditional_model_raises(on_device: None) -> None:
    torch.manual_seed(0)
    model = ConditionalLanguageModel(DecoderConfig(4, "lstm", 12, 1, 2), 5)
    with torch.no_grad():
        model.head.bias[-1] = -100  # none stops
    source = torch.randn(3, 5)
    source[ROW] = torch.nan
    with pytest.raises(UserError, match=f"finite maximum and no NaN .* row {ROW}$"):
        model.generate(source=source, max_tokens=4)
