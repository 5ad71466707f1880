"""The LSTM language model: embedding, stacked LSTM, linear head."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from seqkern import ops
from seqkern.models.language_model import check_dropout, check_sizes
from seqkern.models.parts import is_plain
from seqkern.models.recurrent import RecurrentLanguageModel
from seqkern.nn import LSTM
from seqkern.ops._autocast import autocast, autocast_weights

LSTMState = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # h and c, each [B, H] per layer


@dataclass(frozen=True)
class LSTMConfig:
    """Sizes of an `LSTMLanguageModel`."""

    vocab_size: int
    hidden: int = 256  # H, the width of embedding and layers
    layers: int = 2
    dropout: float = 0.0  # on the embedding, between layers, and before the head

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_sizes(vocab_size=self.vocab_size, hidden=self.hidden, layers=self.layers)
        check_dropout(self.dropout)


class LSTMLanguageModel(RecurrentLanguageModel):
    """p(x_i | x_<i) by a long short-term memory.

        x_t = E[token_t];  (h_t, c_t) = LSTM(x_t, h_{t-1}, c_{t-1});  logits_t = W h_t + b

    Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000 in PyTorch's gate
    order (i, f, g, o). The state starts at zero for every row of `forward`.

    Args:
        config: the sizes.
        backend: `seqkern` or `torch`; the parameters of the same seed are the same for both.

    Example:
        >>> model = LSTMLanguageModel(LSTMConfig(vocab_size=10, hidden=8, layers=1))
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 10])
    """

    def __init__(self, config: LSTMConfig, backend: str = "seqkern") -> None:
        """See the class."""
        super().__init__(config.vocab_size, None, backend)
        self.config = config
        H = config.hidden
        self.embedding = nn.Embedding(config.vocab_size, H)
        self.lstm = self.layers.LSTM(
            H,
            H,
            config.layers,
            batch_first=True,
            dropout=config.dropout if config.layers > 1 else 0.0,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(H, config.vocab_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform weights of 1 / sqrt(H); forget gates open (bias 1), other biases zero."""
        H = self.config.hidden
        nn.init.normal_(self.embedding.weight, std=0.1)
        for name, parameter in self.lstm.named_parameters():
            if "weight" in name:
                nn.init.uniform_(parameter, -(H**-0.5), H**-0.5)
            else:
                nn.init.zeros_(parameter)
                if "bias_ih" in name:
                    nn.init.ones_(parameter[H : 2 * H])
        nn.init.uniform_(self.head.weight, -(H**-0.5), H**-0.5)
        nn.init.zeros_(self.head.bias)

    @property
    def recurrence(self) -> nn.Module:
        """The layers."""
        module: nn.Module = self.lstm
        return module

    def _read(
        self, tokens: Tensor, state: LSTMState | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, LSTMState]:
        stacked = None if state is None else tuple(torch.stack(s) for s in state)
        hidden, (h, c) = super()._read(tokens, stacked, lengths)
        return hidden, (h.unbind(), c.unbind())

    @torch.no_grad()
    def next_logits(
        self,
        tokens: Tensor,
        state: LSTMState | None = None,
        lengths: Tensor | None = None,
        *,
        capacity: int | None = None,
    ) -> tuple[Tensor, LSTMState]:
        """Read tokens [B, T] after `state`: logits [B, V] of the next token, and the new state.

        One token is one call per layer, which moves no state.
        """
        if state is None or tokens.shape[1] > 1 or self.training or not self._has_plain_layers():
            return super().next_logits(tokens, state, lengths)
        x = self.embedding(tokens[:, 0])  # [B, H]
        hs, cs = [], []
        own = self.lstm._parameters
        names = cast(list[str], self.lstm._flat_weights_names)
        weights: Any = [own[name] for name in names]  # four per layer
        for n, (h, c) in enumerate(zip(*state, strict=True)):
            x, h, c = autocast(x, h, c)
            layer = autocast_weights(*weights[4 * n : 4 * n + 4])
            x, c_new = ops.lstm_cell(x, (h, c), *layer)
            hs.append(x)
            cs.append(c_new)
        return self.logits(x), (tuple(hs), tuple(cs))  # [B, V]

    def _has_plain_layers(self) -> bool:
        """Whether a token is a step of an LSTM cell per layer, between embedding and head."""
        lstm: Any = self.lstm
        return (
            is_plain(lstm, LSTM)
            and is_plain(self.dropout, nn.Dropout)
            and lstm.bias
            and not lstm.bidirectional
            and lstm.proj_size == 0
        )
