"""Random blocks of a token sequence of any size: epochs, shards and a position to resume from."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from seqkern.data.token_file import TokenFile
from seqkern.errors import require

_ROUNDS = 6
_WORD = (1 << 64) - 1
_Item = TypeVar("_Item")


class Blocks:
    r"""Blocks of n + 1 tokens in random order, each once per epoch.

    An epoch cuts the tokens, from a random offset :math:`o` on, into blocks that start at
    :math:`o + i n`, so that every token between is a target exactly once; what is left over at both
    ends is less than 2 n tokens. Block i of the epoch's
    order comes from a pseudo-random permutation of the blocks that is computed, not stored: memory
    is the batch's alone. Of each world_size batches that follow one another in that order, rank r
    takes the r-th: no two ranks see a block in common, and all see as many. What does not fill
    those batches is left out, other blocks in each epoch.

    Iterating gives the rest of the current epoch and moves to the next one.

    Args:
        tokens: integers [N], or a `TokenFile`, or the path of one.
        context: n, inputs per block.
        batch_size: B, blocks [B, n + 1] at once; None gives single blocks [n + 1].
        seed: of offsets and orders.
        rank: this process's number.
        world_size: processes that share the tokens.

    Raises:
        UserError: an option outside its range, no token file, or too few tokens for one batch per
            rank.

    Example:
        >>> blocks = Blocks(torch.arange(100), context=9, batch_size=2, seed=1)
        >>> next(iter(blocks)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        tokens: Tensor | TokenFile | str | Path,
        context: int,
        batch_size: int | None = None,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """See the class."""
        if isinstance(tokens, (str, Path)):
            tokens = TokenFile(tokens)
        self.tokens = tokens.tokens if isinstance(tokens, TokenFile) else tokens
        require(
            self.tokens.dim() == 1 and not self.tokens.is_floating_point(),
            f"tokens must be integers [N], got {self.tokens.dtype} {list(self.tokens.shape)}",
        )
        require(context >= 1, f"context must be at least 1, got {context}")
        require(
            batch_size is None or batch_size >= 1,
            f"batch_size must be at least 1, got {batch_size}",
        )
        require(0 <= seed < 2**63, f"seed must be in [0, 2**63), got {seed}")
        require(world_size >= 1, f"world_size must be at least 1, got {world_size}")
        require(0 <= rank < world_size, f"rank must be in [0, {world_size}), got {rank}")
        self.context, self.batch_size, self.seed = context, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.position = 0
        N = len(self.tokens)
        require(
            context + 1 <= N,
            f"the training text has {N} tokens, less than one block of "
            f"context + 1 = {context + 1}: use a longer text or a smaller context",
        )
        # As many as every offset leaves room for, so that all epochs are as long.
        self._blocks = max(1, N // context - 1)
        self._offsets = N - self._blocks * context
        needed = (batch_size or 1) * world_size
        require(
            self._blocks >= needed,
            f"{N} tokens make {self._blocks} blocks of context + 1 = {context + 1} per epoch, less "
            f"than one batch on every rank: {needed}",
        )
        self._keys: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        """Batches (or single blocks) per epoch of this rank."""
        return self._blocks // ((self.batch_size or 1) * self.world_size)

    def __iter__(self) -> Iterator[Tensor]:
        """The rest of the epoch: int64 [B, n + 1], or [n + 1]."""
        epoch = self.epoch
        while self.epoch == epoch:
            yield self.draw()

    def draw(self) -> Tensor:
        """The next batch int64 [B, n + 1] (or block [n + 1]); after an epoch's last the next's."""
        B = self.batch_size or 1
        first = (self.position * self.world_size + self.rank) * B
        n = self.context
        offset, *keys = self._epoch_keys()
        starts = [
            offset % self._offsets + n * _permuted(i, self._blocks, keys)
            for i in range(first, first + B)
        ]
        batch = torch.stack([self.tokens[s : s + n + 1].long() for s in starts])  # [B, n + 1]
        self.position += 1
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        return batch if self.batch_size is not None else batch[0]

    def _epoch_keys(self) -> list[int]:
        """Random numbers of the epoch: of its offset and of each round of its permutation."""
        if self._keys[0] != self.epoch:
            of_epoch = _mixed(_mixed(self.seed) ^ self.epoch)
            self._keys = (self.epoch, [_mixed(of_epoch ^ k) for k in range(1 + _ROUNDS)])
        return self._keys[1]

    def state_dict(self) -> dict[str, int]:
        """Where the blocks stand; `load_state_dict` continues from there."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()` of the same tokens and options.

        Raises:
            UserError: a position that these blocks do not have.
        """
        epoch, position = int(state["epoch"]), int(state["position"])
        require(
            epoch >= 0 and 0 <= position < len(self),
            f"state must be of an epoch of {len(self)} batches, got epoch {epoch} and position "
            f"{position}",
        )
        self.epoch, self.position = epoch, position


blocks = Blocks


def _mixed(x: int) -> int:
    """64 bits that depend on all 64 of x: a step of SplitMix64 (Steele et al. 2014)."""
    x = x + 0x9E3779B97F4A7C15 & _WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31


def _permuted(i: int, size: int, keys: Sequence[int]) -> int:
    """Where a pseudo-random permutation of range(size) puts i.

    A Feistel network (Luby and Rackoff 1988) permutes the numbers of an even number of bits; one
    that leaves the range goes through again, which keeps it a permutation of the range.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for key in keys:
            left, right = right, left ^ _mixed(key ^ right) & mask
        i = left << half | right
        if i < size:
            return i


@overload
def prefix_examples(block: Tensor) -> Iterator[tuple[Tensor, Tensor]]: ...
@overload
def prefix_examples(block: Sequence[_Item]) -> Iterator[tuple[Sequence[_Item], _Item]]: ...
def prefix_examples(block: Any) -> Iterator[tuple[Any, Any]]:
    """The n examples a block of n + 1 tokens stands for: each prefix and the token after it.

    A model with causal states learns from all of them in one pass: its output at position i has
    seen x_1 .. x_i, and its target is x_{i+1}.

    Args:
        block: [n + 1] tokens, a tensor or any sequence.

    Yields:
        (x_1 .. x_i, x_{i+1}) for i = 1 .. n.

    Raises:
        UserError: a tensor of more dimensions, or a block of less than two tokens.

    Example:
        >>> [(" ".join(x), y) for x, y in prefix_examples("The cat sat".split())]
        [('The', 'cat'), ('The cat', 'sat')]
    """
    if isinstance(block, Tensor):
        require(block.dim() == 1, f"block must be [n + 1], got {list(block.shape)}")
    require(len(block) >= 2, f"block must hold at least 2 tokens, got {len(block)}")
    return ((block[:i], block[i]) for i in range(1, len(block)))
