"""Models of sequences in every shape: what they read, and what they write."""

from dataclasses import fields
from typing import Any

from seqkern.errors import require
from seqkern.models.autoregressive import AutoregressiveModel
from seqkern.models.conditional import ConditionalLanguageModel
from seqkern.models.decoder import DecoderConfig
from seqkern.models.decoding import Decoded
from seqkern.models.encoder import EncoderConfig
from seqkern.models.forecast import Forecast
from seqkern.models.forecaster import ForecasterConfig, SeriesForecaster
from seqkern.models.gpt import GPT, GPTConfig
from seqkern.models.labelling import SequenceClassifier, SequenceTagger
from seqkern.models.language_model import LanguageModel
from seqkern.models.lstm import LSTMConfig, LSTMLanguageModel
from seqkern.models.rnn import RNNConfig, RNNLanguageModel
from seqkern.models.seq2seq import Seq2Seq

__all__ = [
    "GPT",
    "MODELS",
    "AutoregressiveModel",
    "ConditionalLanguageModel",
    "Decoded",
    "DecoderConfig",
    "EncoderConfig",
    "Forecast",
    "ForecasterConfig",
    "GPTConfig",
    "LSTMConfig",
    "LSTMLanguageModel",
    "LanguageModel",
    "RNNConfig",
    "RNNLanguageModel",
    "Seq2Seq",
    "SequenceClassifier",
    "SequenceTagger",
    "SeriesForecaster",
    "build_model",
]

MODELS: dict[str, tuple[Any, Any]] = {  # name: its config, its model
    "lstm": (LSTMConfig, LSTMLanguageModel),
    "rnn": (RNNConfig, RNNLanguageModel),
    "gpt": (GPTConfig, GPT),
}


def build_model(name: str, sizes: dict[str, Any], backend: str = "seqkern") -> LanguageModel:
    """The model `name` with those of `sizes` that its config has; the rest does not concern it."""
    require(name in MODELS, f"model must be one of {', '.join(MODELS)}, got {name!r}")
    config_class, model_class = MODELS[name]
    wanted = {field.name for field in fields(config_class)}
    config = config_class(**{key: value for key, value in sizes.items() if key in wanted})
    model: LanguageModel = model_class(config, backend)
    return model
