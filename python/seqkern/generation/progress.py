"""Which rows of a batch are done, and who is told of new tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from seqkern.generation.sampler import Sampler
from seqkern.generation.sequences import Sequences


class Progress:
    """Looks at what `Sequences` took since it last looked.

    Args:
        sequences: of the call.
        new: the most tokens a row adds.
        stop_tokens: a row ends with the first of these that it adds.
        on_token: called with the i-th new token of all rows [B], in the order of i; rows that have
            ended repeat their last.
    """

    def __init__(
        self,
        sequences: Sequences,
        new: int,
        stop_tokens: Collection[int] | None,
        on_token: Callable[[Tensor], None] | None,
    ) -> None:
        """See the class."""
        self.sequences, self.new = sequences, new
        self.stops = frozenset(stop_tokens or ())
        self.on_token = on_token
        self._seen = list(sequences.lengths)  # of each row of the call
        self._shown = 0  # new tokens that on_token has had

    @property
    def streams(self) -> bool:
        """Whether each token is wanted as soon as it is drawn."""
        return self.on_token is not None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to look for: all rows add as many tokens as they may."""
        return not self.stops and self.on_token is None

    def look(self, smallest_drop: float = 0.5) -> list[int] | None:
        """Find rows that have ended, and tell `on_token` of what is complete.

        A smaller batch costs a copy of the model's state, so rows that have ended may stay in it.

        Args:
            smallest_drop: part of the batch that must have ended to leave it, above 1 for never.

        Returns:
            rows of the batch that go on, where others leave it or none goes on; else None.
        """
        self._find_ends()
        if self.on_token is not None:
            self._show()
        batch = self.sequences.batch
        going = [r for r, row in enumerate(batch) if row not in self.sequences.ends]
        ended = len(batch) - len(going)
        if going and (ended == 0 or ended < smallest_drop * len(batch)):
            return None
        self.sequences.keep(going)
        return going

    def _find_ends(self) -> None:
        sequences, lengths = self.sequences, self.sequences.lengths
        starts = [self._seen[row] for row in sequences.batch]
        ends = [lengths[row] for row in sequences.batch]
        drawn: list[list[int]] = []
        if self.stops:
            drawn = sequences.windows(sequences.batch, starts, ends).tolist()
        for r, row in enumerate(sequences.batch):
            if row in sequences.ends:
                continue
            self._seen[row] = ends[r]
            limit = sequences.prompts[row] + self.new
            if ends[r] >= limit:
                sequences.ends[row] = limit
            for i in range(ends[r] - starts[r]) if self.stops else ():
                if drawn[r][i] in self.stops:
                    sequences.ends[row] = starts[r] + i + 1
                    break

    def _show(self) -> None:
        """Hand on the tokens that every row has, or has ended before."""
        sequences = self.sequences
        rows = range(len(sequences.prompts))
        added = [sequences.length(row) - sequences.prompts[row] for row in rows]
        growing = [added[row] for row in rows if row not in sequences.ends]
        ready = min(growing) if growing else max(added)
        if ready == self._shown:
            return
        assert self.on_token is not None
        sequences.flush()
        device = sequences.tokens.device
        if device.type != Sampler.looking_device:  # else the draw has raised
            sequences.check(self._shown, ready)
        prompts = torch.tensor(sequences.prompts, device=device)
        last = torch.tensor([sequences.length(row) - 1 for row in rows], device=device)
        every = torch.arange(len(added), device=device)
        for i in range(self._shown, ready):
            self.on_token(sequences.tokens[every, (prompts + i).minimum(last)])
        self._shown = ready
