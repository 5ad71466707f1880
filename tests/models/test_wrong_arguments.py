"""Arguments of wrong types and sizes are a `UserError` that names them."""

import numpy as np
import pytest
import torch

from seqkern.data.series import Normalizer, make_series
from seqkern.errors import UserError
from seqkern.forecasting import train_forecaster
from seqkern.models import (
    AutoregressiveModel,
    ForecasterConfig,
    LSTMConfig,
    LSTMLanguageModel,
    SeriesForecaster,
)

LANGUAGE = LSTMLanguageModel(LSTMConfig(vocab_size=10, hidden=8))
PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])
LINEAR = AutoregressiveModel(1)
NETWORK = SeriesForecaster(ForecasterConfig(context=8, hidden=8))
WAVE = torch.sin(torch.arange(60.0))


def generate(prompt=PROMPT, new=2, **options):
    return LANGUAGE.generate(prompt, new, **{"seed": 0} | options)


CALLS = {
    "prompt": (lambda: generate(PROMPT.tolist()), "prompt must be a tensor, got list"),
    "lengths": (lambda: generate(lengths=[1, 2]), "lengths must be a tensor, got list"),
    "seed": (lambda: generate(seed=[1, 2]), r"seed must be a number or int64 \[2\], got list"),
    "new": (lambda: generate(new=2.5), "max_new_tokens must be a whole number, got float"),
    "top-k": (lambda: generate(top_k=None), "top_k must be an integer or a tensor, got None"),
    "hot": (lambda: generate(temperature="hot"), "temperature must be a number or .* got 'hot'"),
    "top-k-part": (lambda: generate(top_k=2.5), "top_k must be an integer or a tensor, got 2.5"),
    "hotter": (
        lambda: generate(temperature=10**400),
        r"temperature must be at least 0 and finite, got 10+\.\.\.$",
    ),
    "on-token": (lambda: generate(on_token=5), "on_token must be a function, got int"),
    "no-draft": (lambda: generate(draft="x"), "draft must be a language model, got str"),
    "draft": (
        lambda: generate(draft=LANGUAGE, draft_tokens=None),
        r"draft_tokens must be in \[1, 15\], got None",
    ),
    "stop": (lambda: generate(stop_tokens=3), r"stop_tokens must be .* in \[0, 10\), got 3"),
    "stop-outside": (lambda: generate(stop_tokens=[1, 99]), r"\[0, 10\), got 99 in it"),
    "stop-text": (lambda: generate(stop_tokens="\n"), r"stop_tokens must be .* got '\\n' in it"),
    "log-prob": (lambda: LANGUAGE.log_prob([[1, 2]]), "sequences must be a tensor, got list"),
    "forward": (lambda: LANGUAGE([[1, 2]]), "tokens must be a tensor, got list"),
    "fit-array": (lambda: LINEAR.fit(WAVE.numpy()), "series must be a tensor, got ndarray"),
    "fit-arrays": (lambda: LINEAR.fit([WAVE.numpy()]), "series must be a tensor, got ndarray"),
    "fit-large": (
        lambda: LINEAR.fit(WAVE.double() * 1e200),
        "column 0 of series: its values, -9.99.*e.199 to 9.99.*e.199, are too large or too close",
    ),
    "fit-small": (lambda: LINEAR.fit(WAVE.double() * 1e-310), "too close to one another"),
    "normalizer": (
        lambda: Normalizer.fit(WAVE.double()[:, None] * 1e300, ["y"]),
        "column y: its values",
    ),
    "unfitted": (lambda: AutoregressiveModel(2).forecast(WAVE, 3), "no parameters yet: call fit"),
    "unfitted-density": (lambda: AutoregressiveModel(2).log_prob(WAVE[None]), "call fit"),
    "forecast-list": (lambda: NETWORK.forecast([[1.0]]), "history must be a tensor, got list"),
    "forecast-large": (
        lambda: NETWORK.forecast(torch.tensor([[3e38], [-3e38]])),
        "the forecast is not finite: the values of the history are too large",
    ),
    "forecast-larger": (lambda: NETWORK.forecast(WAVE[:, None].double() * 1e200), "must be finite"),
    "train-flat": (
        lambda: train_forecaster(NETWORK, [WAVE], progress=False),
        r"training\[0\] must be \[T, 1\], got \[60\]",
    ),
    "train-array": (
        lambda: train_forecaster(NETWORK, [WAVE[:, None].numpy()], progress=False),
        r"training\[0\] must be a tensor, got ndarray",
    ),
    "columns-twice": (
        lambda: make_series(np.ones((5, 2)), columns=["y", "y"]),
        "columns must be different, got y more than once",
    ),
    "infinite-before-missing": (
        lambda: make_series([0.0, np.inf, 2.0], [0, 1, 3]),
        "0 is infinite at 1",
    ),
}


@pytest.mark.parametrize(("call", "message"), CALLS.values(), ids=CALLS)
def test_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_padding_of_a_prompt_may_hold_anything():
    lengths = torch.tensor([3, 1])
    padded = PROMPT.clone()
    padded[1, 1:] = -100
    assert torch.equal(generate(padded, lengths=lengths), generate(lengths=lengths))


def test_parameters_that_were_loaded_or_written_count_as_fitted():
    fitted = AutoregressiveModel(2).fit(WAVE)
    loaded = AutoregressiveModel(2)
    loaded.load_state_dict(fitted.state_dict())
    assert torch.equal(loaded.forecast(WAVE, 3).center, fitted.forecast(WAVE, 3).center)
    noise = AutoregressiveModel(1)
    noise.covariance.fill_(1.0)
    assert noise.log_prob(torch.zeros(1, 3)).item() == pytest.approx(-1.8378770664)
