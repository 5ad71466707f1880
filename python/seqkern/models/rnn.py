"""The Elman language model: embedding, stacked tanh recurrence, linear head."""

from dataclasses import dataclass

from torch import nn

from seqkern.models.language_model import check_dropout, check_sizes
from seqkern.models.recurrent import RecurrentLanguageModel


@dataclass(frozen=True)
class RNNConfig:
    """Sizes of an `RNNLanguageModel`."""

    vocab_size: int
    hidden: int = 256  # H, the width of embedding and layers
    layers: int = 2
    dropout: float = 0.0  # on the embedding, between layers, and before the head

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_sizes(vocab_size=self.vocab_size, hidden=self.hidden, layers=self.layers)
        check_dropout(self.dropout)


class RNNLanguageModel(RecurrentLanguageModel):
    """p(x_i | x_<i) by a simple recurrent network.

        x_t = E[token_t];  h_t = tanh(W_x x_t + W_h h_{t-1} + b);  logits_t = W h_t + b'

    Elman 1990. The state starts at zero for every row of `forward`.

    Args:
        config: the sizes.
        backend: `seqkern` or `torch`; the parameters of the same seed are the same for both.

    Example:
        >>> model = RNNLanguageModel(RNNConfig(vocab_size=10, hidden=8, layers=1))
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 10])
    """

    def __init__(self, config: RNNConfig, backend: str = "seqkern") -> None:
        """See the class."""
        super().__init__(config.vocab_size, None, backend)
        self.config = config
        H = config.hidden
        self.embedding = nn.Embedding(config.vocab_size, H)
        self.rnn = self.layers.RNN(
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
        """Uniform input weights of 1 / sqrt(H), biases zero, orthogonal recurrent weights.

        An orthogonal W_h keeps the length of h: gradients through many steps neither vanish nor
        explode at the start (Saxe et al. 2014).
        """
        H = self.config.hidden
        nn.init.normal_(self.embedding.weight, std=0.1)
        for name, parameter in self.rnn.named_parameters():
            if "weight_hh" in name:
                nn.init.orthogonal_(parameter)
            elif "weight_ih" in name:
                nn.init.uniform_(parameter, -(H**-0.5), H**-0.5)
            else:
                nn.init.zeros_(parameter)
        nn.init.uniform_(self.head.weight, -(H**-0.5), H**-0.5)
        nn.init.zeros_(self.head.bias)

    @property
    def recurrence(self) -> nn.Module:
        """The layers."""
        module: nn.Module = self.rnn
        return module
