"""The sequences of a call of `generate`, each row at its own length."""

from __future__ import annotations

import torch
from torch import Tensor

from seqkern.generation.sampler import check_drawn


class Sequences:
    """Prompts and what was drawn after them; the batch is the rows still growing.

    Args:
        prompt: int64 [B, T].
        lengths: tokens of each prompt.
        room: the most tokens a row will add.
    """

    def __init__(self, prompt: Tensor, lengths: list[int], room: int) -> None:
        """See the class."""
        B, T = prompt.shape
        self.tokens = prompt.new_zeros(B, T + room)  # [B, T + room], first lengths[b] of row b
        self.tokens[:, :T] = prompt
        self.logprobs = torch.zeros(B, room, dtype=torch.float32, device=prompt.device)
        self.prompts = list(lengths)
        self.lengths = list(lengths)  # as read and drawn, beyond a row's end too
        self.ends: dict[int, int] = {}  # lengths of the rows that have ended
        self.batch = list(range(B))  # row of the batch: row of the call
        self._waiting: list[tuple[Tensor, Tensor]] = []  # tokens and log-probabilities [R]

    def append(self, token: Tensor, logprob: Tensor) -> None:
        """One more token [R] for each row of the batch.

        Written when somebody reads: a small model's step is too short for a scatter.
        """
        self._waiting.append((token, logprob))
        for row in self.batch:
            self.lengths[row] += 1

    def extend(self, tokens: Tensor, logprobs: Tensor, counts: list[int]) -> None:
        """The first counts[r] of tokens [R, S] for row r of the batch, within the room."""
        self.flush()
        for r, row in enumerate(self.batch):
            start, n = self.lengths[row], counts[r]
            new = start - self.prompts[row]
            self.tokens[row, start : start + n] = tokens[r, :n]
            self.logprobs[row, new : new + n] = logprobs[r, :n]
            self.lengths[row] = start + n

    def flush(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        tokens, logprobs = (torch.stack(list(t), 1) for t in zip(*self._waiting, strict=True))
        n = tokens.shape[1]
        device = tokens.device
        rows = torch.tensor(self.batch, device=device).unsqueeze(1)  # [R, 1]
        ends = torch.tensor([self.lengths[row] for row in self.batch], device=device)
        new = torch.tensor([self.lengths[row] - self.prompts[row] for row in self.batch])
        last = torch.arange(-n, 0, device=device)  # [n]
        self.tokens[rows, ends.unsqueeze(1) + last] = tokens
        self.logprobs[rows, new.to(device).unsqueeze(1) + last] = logprobs
        self._waiting.clear()

    def windows(self, rows: list[int], starts: list[int], ends: list[int]) -> Tensor:
        """Tokens starts[r] .. ends[r] - 1 of rows of the call, [R, longest], padded with any."""
        self.flush()
        width = max((e - s for s, e in zip(starts, ends, strict=True)), default=0)
        index = torch.tensor(starts).unsqueeze(1) + torch.arange(width)  # [R, W]
        index = index.clamp_(max=self.tokens.shape[1] - 1).to(self.tokens.device)
        return self.tokens[torch.tensor(rows, device=self.tokens.device).unsqueeze(1), index]

    def keep(self, batch_rows: list[int]) -> None:
        """Let only these rows of the batch go on."""
        self.flush()
        self.batch = [self.batch[r] for r in batch_rows]

    def length(self, row: int) -> int:
        """Tokens of row `row` of the call, up to its end."""
        return self.ends.get(row, self.lengths[row])

    def check(self, first: int, end: int) -> None:
        """Raise `UserError` if any of a row's new tokens first .. end - 1 had no distribution."""
        self.flush()
        rows = range(len(self.prompts))
        added = [self.length(row) - self.prompts[row] for row in rows]
        places = torch.arange(first, end, device=self.tokens.device)
        exists = places < torch.tensor(added, device=self.tokens.device).unsqueeze(1)  # [B, n]
        check_drawn(self.logprobs[:, first:end].where(exists, 0), first)

    def result(self) -> tuple[Tensor, Tensor]:
        """Tokens [B, longest] and log-probabilities [B, most new tokens].

        Beyond a row's end its last token is repeated, with log-probability 0.

        Raises:
            UserError: a token was drawn where there was no distribution.
        """
        self.flush()
        lengths = [self.length(row) for row in range(len(self.prompts))]
        width = max(lengths)
        new = max(n - p for n, p in zip(lengths, self.prompts, strict=True))
        for row, (n, p) in enumerate(zip(lengths, self.prompts, strict=True)):
            self.tokens[row, n:width] = self.tokens[row, n - 1].clone()
            self.logprobs[row, n - p :] = 0
        check_drawn(self.logprobs)
        return self.tokens[:, :width].contiguous(), self.logprobs[:, :new].contiguous()
