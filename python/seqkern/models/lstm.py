"""The LSTM language model: embedding, stacked LSTM, linear head."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqkern import ops
from seqkern.models.language_model import LanguageModel, check_dropout, check_sizes

# h and c, each [layers, B, H], or [B, H] for each layer.
LSTMState = tuple[Tensor | tuple[Tensor, ...], Tensor | tuple[Tensor, ...]]


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


class LSTMLanguageModel(LanguageModel):
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

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, *, return_logits: bool = False
    ) -> Tensor | tuple[Tensor | None, Tensor]:
        """Logits at every position, and the loss where targets are given.

        Args:
            tokens: int64 or int32 [B, T], T >= 1.
            targets: int64 [B, T], the tokens that follow.
            return_logits: make the logits beside the loss too, which costs their memory.

        Returns:
            logits [B, T, V]; with targets (None, loss) or, with return_logits, (logits, loss);
            loss is the mean cross-entropy in nats.

        Raises:
            UserError: tokens of the wrong dtype, shape or range.
        """
        self.check(tokens, targets)
        x = self.dropout(self.embedding(tokens))  # [B, T, H]
        hidden, _ = self.lstm(x)  # [B, T, H]
        return self.output(self.dropout(hidden), targets, return_logits)

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """The output layer's."""
        return self.head.weight, self.head.bias

    def next_logits(
        self, tokens: Tensor, state: LSTMState | None = None
    ) -> tuple[Tensor, LSTMState]:
        """Read tokens [B, T] after `state`: logits [B, V] of the next token, and the new state."""
        if tokens.shape[1] == 1 and self.backend == "seqkern" and not self.training:
            return self._step(tokens[:, 0], state)
        stacked = state and tuple(s if isinstance(s, Tensor) else torch.stack(s) for s in state)
        hidden, last = self.lstm(self.dropout(self.embedding(tokens)), stacked)  # [B, T, H]
        return self.head(self.dropout(hidden[:, -1])), last  # [B, V]

    def _step(self, tokens: Tensor, state: LSTMState | None) -> tuple[Tensor, LSTMState]:
        """One token [B] of evaluation: a call per layer, and states that are not stacked."""
        x = self.embedding(tokens)  # [B, H]
        hs, cs = [], []
        zeros = torch.zeros_like(x) if state is None else x
        layers: Any = self.lstm.all_weights
        for n, weights in enumerate(layers):
            before = (zeros, zeros) if state is None else (state[0][n], state[1][n])
            x, c = ops.lstm_cell(x, before, *weights)
            hs.append(x)
            cs.append(c)
        return self.head(x), (tuple(hs), tuple(cs))  # [B, V]
