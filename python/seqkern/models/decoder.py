"""A decoder: from a start vector, and perhaps a memory to attend to, to the next element's state.

It serves `Seq2Seq` and `ConditionalLanguageModel`: the whole target at once in training, and one
element at a time in generation, where its state can be reordered for beam search.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from seqkern.models.backends import Layers
from seqkern.models.encoder import check_kind
from seqkern.models.language_model import check_dropout, check_sizes
from seqkern.models.transformer import Attention, DecoderBlock, Memory, positions
from seqkern.nn import KVCache


@dataclass(frozen=True)
class DecoderConfig:
    """What is written, and the sizes of what writes it."""

    vocab_size: int  # V; the stop token is one more, V itself
    kind: str = "lstm"  # or transformer
    hidden: int = 128  # H
    layers: int = 1
    heads: int = 4  # of all attention
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_sizes(
            vocab_size=self.vocab_size, hidden=self.hidden, layers=self.layers, heads=self.heads
        )
        check_kind("transformer", self.hidden, self.heads)
        check_kind(self.kind, self.hidden, self.heads)
        check_dropout(self.dropout)


@dataclass
class DecoderState:
    """Where a decoder stands, N rows."""

    step: int = 0  # elements read
    recurrent: tuple[Tensor, Tensor] | None = None  # lstm: h and c, each [layers, N, H]
    cache: KVCache | None = None  # transformer
    memories: list[Memory] = field(default_factory=list)  # per attention to the memory

    def reorder(self, rows: Tensor) -> None:
        """Make row n what row rows[n] is; both read the same memory."""
        if self.recurrent is not None:
            h, c = self.recurrent
            self.recurrent = h.index_select(1, rows), c.index_select(1, rows)
        if self.cache is not None:
            self.cache.reorder(rows)


class Decoder(nn.Module):
    r"""States :math:`h_0 .. h_T` of a start vector and T tokens, each of what came up to it.

    `lstm`: the layers over the sequence, then attention of their output to the memory, added to it
    (after Luong et al. 2015: the attention does not feed back, so the recurrence is one call).
    `transformer`: blocks of causal attention, attention to the memory, and an MLP.

    Args:
        config: the sizes.
        start: width of the start vector.
        memory: width of the memory; None where there is none.
        layers: of a backend.
    """

    def __init__(
        self, config: DecoderConfig, start: int, memory: int | None, layers: Layers
    ) -> None:
        """See the class."""
        super().__init__()
        self.config, self.layers = config, layers
        H, dropout = config.hidden, config.dropout
        self.start = nn.Linear(start, H)
        self.embedding = nn.Embedding(config.vocab_size, H)
        self.dropout = nn.Dropout(dropout)
        self.lstm: nn.Module | None = None
        self.cross: Attention | None = None
        self.blocks = nn.ModuleList()
        if config.kind == "lstm":
            between = dropout if config.layers > 1 else 0.0
            self.lstm = layers.LSTM(H, H, config.layers, batch_first=True, dropout=between)
            if memory is not None:
                self.cross = Attention(H, memory, config.heads, dropout, layers)
        else:
            self.blocks.extend(
                DecoderBlock(H, memory, config.heads, dropout, layers) for _ in range(config.layers)
            )
        self.norm = nn.LayerNorm(H)

    def forward(
        self, start: Tensor, tokens: Tensor, memory: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """All states at once.

        Args:
            start: [B, S], what is read before the first token.
            tokens: int64 [B, T].
            memory: states [B, M, W] and which of them exist, bool [B, M].

        Returns:
            [B, T + 1, H]: state t has read the start and the first t tokens.
        """
        x = torch.cat([self.start(start)[:, None], self.embedding(tokens)], 1)  # [B, T + 1, H]
        return self._run(x, DecoderState(memories=self._memories(memory)))

    def begin(
        self,
        start: Tensor,
        memory: tuple[Tensor, Tensor] | None,
        copies: int,
        capacity: int,
    ) -> tuple[Tensor, DecoderState]:
        """Read the start vectors: states [B * copies, H], and where the decoder then stands.

        Args:
            start: [B, S].
            memory: as in `forward`.
            copies: rows of each start vector, next to one another (beams).
            capacity: most elements that will be read, the start among them.
        """
        weight = self.embedding.weight
        c = self.config
        state = DecoderState(
            memories=[
                Memory(*(part.repeat_interleave(copies, 0) for part in one))
                for one in self._memories(memory)
            ]
        )
        if c.kind == "transformer":
            state.cache = KVCache(
                c.layers,
                len(start) * copies,
                c.heads,
                capacity,
                c.hidden // c.heads,
                dtype=weight.dtype,
                device=weight.device,
            )
        x = self.start(start).repeat_interleave(copies, 0)[:, None]  # [N, 1, H]
        return self._run(x, state)[:, 0], state

    def step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Read one token [N] more: states [N, H]; `state` moves on."""
        return self._run(self.embedding(tokens)[:, None], state)[:, 0]

    def _memories(self, memory: tuple[Tensor, Tensor] | None) -> list[Memory]:
        """What each attention to the memory reads."""
        if memory is None:
            return []
        if self.cross is not None:
            return [self.cross.memory(*memory)]
        return [block.cross.memory(*memory) for block in self.blocks]  # type: ignore[union-attr, operator]

    def _run(self, x: Tensor, state: DecoderState) -> Tensor:
        """States of [N, T, H] after `state`, which moves on where it is one of generation."""
        x = self.dropout(x)
        if self.lstm is not None:
            x, state.recurrent = self.lstm(x, state.recurrent)  # [N, T, H]
            if self.cross is not None:
                x = x + self.dropout(self.cross.masked(x, state.memories[0]))
        else:
            x = x + positions(state.step, x.shape[1], x.shape[2], x)
            for n, block in enumerate(self.blocks):
                memory = state.memories[n] if state.memories else None
                x = block(x, memory, state.cache, n, state.step)
            if state.cache is not None:
                state.cache.advance(x.shape[1])
        state.step += x.shape[1]
        out: Tensor = self.norm(x)
        return out
