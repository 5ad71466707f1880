"""Models inside what users put around them: autocast, parametrizations, other weights, modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.utils import parametrizations

from seqkern import models, nn
from seqkern.models.transformer import positions

TOKENS = torch.tensor([[1, 2, 3, 6]])


def lstm_model() -> Any:
    torch.manual_seed(0)
    return models.LSTMLanguageModel(models.LSTMConfig(vocab_size=40, hidden=24)).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_generation_under_autocast(dtype: torch.dtype) -> None:
    model = lstm_model()
    with torch.autocast("cpu", dtype):
        assert model.generate(TOKENS, 4, seed=1).shape == (1, 8)
    for decoder in ("lstm", "transformer"):
        config = models.DecoderConfig(12, kind=decoder, hidden=16)
        writer = models.ConditionalLanguageModel(config, condition=5)
        with torch.autocast("cpu", dtype):
            assert len(writer.generate(torch.randn(2, 5), 4, seed=1).tokens) == 2
            assert len(writer.beam_search(torch.randn(2, 5), 4).tokens) == 2


def steps_agree(model: Any) -> None:
    _, state = model.next_logits(TOKENS[:, :3])
    found = model.next_logits(TOKENS[:, 3:], state)[0]
    torch.testing.assert_close(found, model(TOKENS)[:, -1])


@torch.no_grad()
def test_steps_see_a_parametrized_weight() -> None:
    model = lstm_model()
    parametrizations.weight_norm(model.lstm, "weight_hh_l0")
    model.lstm.parametrizations.weight_hh_l0.original0.mul_(3)
    steps_agree(model)


@torch.no_grad()
def test_steps_see_the_weights_of_a_functional_call() -> None:
    class Steps(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = lstm_model()

        def forward(self) -> None:
            steps_agree(self.model)

    steps = Steps()
    weights = {name: 2 * p.detach() for name, p in steps.named_parameters()}
    torch.func.functional_call(steps, weights, ())


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_positions_under_another_default_dtype(default: torch.dtype) -> None:
    like = torch.zeros(1)
    expected = positions(500, 8, 16, like)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(positions(500, 8, 16, like), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("training", [False, True])
def test_parts_keep_their_modes(training: bool) -> None:
    model = models.LSTMLanguageModel(models.LSTMConfig(10, 8, dropout=0.5)).train(training)
    model.dropout.train(not training)
    model.generate(torch.tensor([[1]]), 2)
    model.log_prob(torch.tensor([[1, 2]]))
    assert model.training is training
    assert model.dropout.training is not training
    assert model.lstm.training is training


def test_sampled_forecasts_in_16_bits() -> None:
    config = models.ForecasterConfig(columns=1, hidden=8)
    model = models.SeriesForecaster(config).bfloat16()
    forecast = model.forecast_sampled(torch.randn(2, 9, 1).bfloat16(), 3, paths=5)
    assert forecast.center.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)], ids=str)
def test_attention_of_nothing(shape: tuple[int, int, int]) -> None:
    layer = nn.CausalSelfAttention(8, 2)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == shape
    assert x.grad is not None
