"""A batch of sequences of different lengths to one state per element."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.errors import require
from seqkern.models.backends import Layers, run_recurrent
from seqkern.models.language_model import check_dropout, check_sizes, last_of
from seqkern.models.padding import clean_tokens, zero_padding
from seqkern.models.transformer import EncoderBlock, positions

KINDS = ("lstm", "transformer")
_FEW = 16  # rows of a matrix product; seen to matter with MKL below 12


@dataclass(frozen=True)
class EncoderConfig:
    """What is read, and the sizes of what reads it.

    Elements are tokens (`vocab_size`) or records of so many real numbers (`features`), one of the
    two.
    """

    vocab_size: int = 0
    features: int = 0
    kind: str = "lstm"  # or transformer
    hidden: int = 128  # H, the width of an element's state
    layers: int = 1
    heads: int = 4  # of the transformer
    dropout: float = 0.0
    bidirectional: bool = True  # lstm: half of the state reads forwards, half backwards

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(
            (self.vocab_size >= 1) != (self.features >= 1),
            "one of vocab_size and features must be at least 1 and the other 0, got "
            f"{self.vocab_size} and {self.features}",
        )
        check_kind(self.kind, self.hidden, self.heads)
        check_sizes(hidden=self.hidden, layers=self.layers, heads=self.heads)
        check_dropout(self.dropout)
        require(
            self.kind != "lstm" or not self.bidirectional or self.hidden % 2 == 0,
            f"hidden must be even for two directions, got {self.hidden}",
        )


def check_kind(kind: str, hidden: int, heads: int) -> None:
    """Raise `UserError` for an unknown kind, or heads that do not divide the width."""
    require(kind in KINDS, f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    require(
        kind == "lstm" or heads < 1 or hidden % heads == 0,
        f"hidden must be a multiple of heads = {heads}, got {hidden}",
    )


class Encoder(nn.Module):
    """One state per element of each row; nothing in a row depends on padding or other rows.

    `lstm`: Hochreiter and Schmidhuber 1997, both ways as Schuster and Paliwal 1997, on
    `seqkern.nn.LSTM` with lengths. `transformer`: pre-norm blocks (Vaswani et al. 2017) with
    positions of sines; its attention reads both ways and is PyTorch's, masked.

    Args:
        config: the sizes.
        layers: of a backend.
    """

    def __init__(self, config: EncoderConfig, layers: Layers) -> None:
        """See the class."""
        super().__init__()
        self.config = config
        H = config.hidden
        self.embedding: nn.Module = (
            nn.Embedding(config.vocab_size, H)
            if config.vocab_size
            else nn.Linear(config.features, H)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.lstm: nn.Module | None = None
        if config.kind == "lstm":
            self.lstm = layers.LengthsLSTM(
                H,
                H // 2 if config.bidirectional else H,
                config.layers,
                batch_first=True,
                dropout=config.dropout if config.layers > 1 else 0.0,
                bidirectional=config.bidirectional,
            )
        else:
            self.blocks = nn.ModuleList(
                EncoderBlock(H, config.heads, config.dropout, layers) for _ in range(config.layers)
            )
            self.norm = nn.LayerNorm(H)

    def forward(self, x: Tensor, lengths: Tensor, valid: Tensor) -> Tensor:
        """States [B, T, H], zero in the padding.

        Args:
            x: integers [B, T] of the vocabulary, or floating point [B, T, F].
            lengths: int64 [B], from 1 to T.
            valid: bool [B, T], the elements below the lengths.

        Raises:
            UserError: x of the wrong dtype, shape or range.
        """
        x = self.dropout(self._embedded(x, valid))  # [B, T, H]
        if self.lstm is not None:
            return self._read(self.lstm, x, lengths)
        x = x + positions(0, x.shape[1], x.shape[2], x)
        for block in self.blocks:
            x = block(x, valid)
        return zero_padding(self.norm(x), valid)

    @staticmethod
    def _read(lstm: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        """The layers' output [B, T, H] for x [B, T, C].

        They multiply by weights only the elements that exist, of all rows together. With few of
        these the matrix product is another kernel, which rounds differently, and a row's bits would
        depend on the lengths of the others; so a small batch gets one more row.
        """
        B, T, _ = x.shape
        if B < _FEW:
            x = F.pad(x, (0, 0, 0, max(0, _FEW - T), 0, 1))  # [B + 1, >= _FEW, C]
            lengths = F.pad(lengths, (0, 1), value=_FEW)
        return run_recurrent(lstm, x, None, lengths)[0][:B, :T]

    def last(self, states: Tensor, lengths: Tensor) -> Tensor:
        """The state [B, H] in which each row ended: of a backward half, at the row's start."""
        ends = last_of(states, lengths)  # [B, H]
        if self.lstm is None or not self.config.bidirectional:
            return ends
        half = self.config.hidden // 2
        return torch.cat([ends[:, :half], states[:, 0, half:]], -1)

    def _embedded(self, x: Tensor, valid: Tensor) -> Tensor:
        if self.config.vocab_size:
            return zero_padding(
                self.embedding(clean_tokens(x, valid, self.config.vocab_size)), valid
            )
        width = self.config.features
        require(
            x.dim() == 3 and x.is_floating_point() and x.shape[2] == width,
            f"records must be floating point [B, T, {width}], got {x.dtype} {list(x.shape)}",
        )
        # Once more after the map: its bias.
        return zero_padding(self.embedding(zero_padding(x, valid)), valid)
