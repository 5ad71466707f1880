"""How a model reads sequences that grow: once per token, in windows where it has a context."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from seqkern.generation.sequences import Sequences

UNLIMITED = 2**62


class Decoder(Protocol):
    """What generation needs of a model. A state is of the model's own kind."""

    vocab_size: int

    @property
    def context(self) -> int | None:
        """Most tokens read at once; None for no limit."""

    @property
    def keeps_state(self) -> bool:
        """Whether `next_logits` returns a state; without one it is given whole windows."""

    @property
    def is_capturable(self) -> bool:
        """Whether `next_logits` of a state may be captured in a CUDA graph."""

    def next_logits(
        self,
        tokens: Tensor,
        state: Any = None,
        lengths: Tensor | None = None,
        *,
        capacity: int | None = None,
    ) -> tuple[Tensor, Any]:
        """Read tokens [B, T] after `state`: logits [B, V] of the next token, and the new state.

        A state that is new will be given no more than `capacity` tokens of a row.
        """

    def step_logits(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read tokens [B, S] after `state`: logits [B, S, V] after each, and the new state.

        Beyond the context, by at most 15 tokens, logits mean nothing; `rewind` forgets them.
        """

    def rewind(self, state: Any, before: Any, tokens: Tensor, keep: Tensor) -> Any:
        """The state after keep [B] of tokens [B, S], which were read from `before` on."""

    def reread(self, state: Any, rows: list[int], tokens: Tensor) -> Any:
        """The state in which `rows` hold just tokens [R, W], W from 0."""

    def select_rows(self, state: Any, rows: Tensor) -> Any:
        """The state of some rows."""


def window_start(length: int, context: int) -> int:
    """Where the window begins in which a sequence of `length` tokens is read.

    A window grows to `context` tokens. The next token drops its older half: context // 2 tokens
    and the new one are left. So a token is read twice at most, where a window sliding by one
    token would be read whole for each.
    """
    drop = context - context // 2
    return drop * max(0, -((context - length) // drop))


class Reader:
    """A model and its state of a batch of sequences."""

    def __init__(self, model: Decoder, sequences: Sequences) -> None:
        """Nothing is read yet."""
        self.model, self.sequences = model, sequences
        self.state: Any = None
        self._starts = [0] * len(sequences.batch)
        self._room = 0  # tokens that all rows may still read in their windows

    def first_logits(self) -> Tensor:
        """Read the prompts; logits [R, V]."""
        logits = self._read_windows()
        self._room = self._count_room()
        return logits

    def next_logits(self, token: Tensor) -> Tensor:
        """Read token [R], the last of each sequence; logits [R, V]."""
        if not self.model.keeps_state:
            return self._read_windows()
        self.spend()
        logits, self.state = self.model.next_logits(token.unsqueeze(1), self.state)
        return logits

    def spend(self) -> None:
        """Make room for one token, and count it as read."""
        if self._room < 1:
            self.make_room()
        self._room -= 1

    def make_room(self) -> None:
        """Let rows whose window is full drop its older half; the last token is not read yet."""
        context = self.model.context
        if context is None:
            self._room = UNLIMITED
            return
        lengths = [self.sequences.lengths[row] for row in self.sequences.batch]
        starts = [window_start(n, context) for n in lengths]
        full = [r for r, start in enumerate(starts) if start != self._starts[r]]
        if full:
            tokens = self.sequences.windows(
                [self.sequences.batch[r] for r in full],
                [starts[r] for r in full],
                [lengths[r] - 1 for r in full],
            )
            self.state = self.model.reread(self.state, full, tokens)
            self._starts = starts
        self._room = self._count_room() + 1

    def rooms(self) -> list[int]:
        """Make room, and say for how many tokens, each row's last among them."""
        self.make_room()
        context = self.model.context
        if context is None:
            return [UNLIMITED] * len(self._starts)
        lengths = (self.sequences.lengths[row] for row in self.sequences.batch)
        return [context - (n - s) + 1 for n, s in zip(lengths, self._starts, strict=True)]

    def select(self, rows: list[int]) -> None:
        """Let only these rows of the batch go on."""
        self._starts = [self._starts[r] for r in rows]
        if self.model.keeps_state:
            device = self.sequences.tokens.device
            self.state = self.model.select_rows(self.state, torch.tensor(rows, device=device))

    def _count_room(self) -> int:
        context = self.model.context
        if context is None:
            return UNLIMITED
        held = (
            self.sequences.lengths[row] - start
            for row, start in zip(self.sequences.batch, self._starts, strict=True)
        )
        return context - max(held)

    def _read_windows(self) -> Tensor:
        """Read all sequences from their windows' starts."""
        rows = self.sequences.batch
        ends = [self.sequences.lengths[row] for row in rows]
        context = self.model.context
        starts = [0 if context is None else window_start(n, context) for n in ends]
        tokens = self.sequences.windows(rows, starts, ends)
        held = [end - start for start, end in zip(starts, ends, strict=True)]
        ragged = min(held) != max(held)
        lengths = torch.tensor(held, device=tokens.device) if ragged else None
        most = self.sequences.tokens.shape[1]
        logits, self.state = self.model.next_logits(tokens, None, lengths, capacity=most)
        return logits
