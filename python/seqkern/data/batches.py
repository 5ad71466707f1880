"""Training and validation batches: blocks of T + 1 tokens, T next-token examples each."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from seqkern.data.token_blocks import Blocks
from seqkern.errors import require

_INTEGERS = (torch.int64, torch.int32, torch.uint16)  # the last two: of token files


def _check_tokens(tokens: Tensor) -> None:
    require(
        tokens.dim() == 1 and tokens.dtype in _INTEGERS,
        f"tokens must be int64 [N], got {tokens.dtype} {list(tokens.shape)}",
    )


class BlockSampler:
    """Random blocks of a text: inputs x_1..x_T and targets x_2..x_{T+1} of T + 1 tokens.

    Start positions are drawn independently and uniformly over all N - T blocks. The generator is
    the sampler's own, so that what is drawn depends on the seed and on nothing else.

    Args:
        tokens: int64 [N], the text, on the CPU.
        context: T, tokens of input per row.
        batch_size: B, rows per batch.
        seed: seed of the start positions.

    Raises:
        UserError: the text is shorter than one block of T + 1 tokens.

    Example:
        >>> sampler = BlockSampler(torch.arange(100), context=8, batch_size=2, seed=0)
        >>> inputs, targets = sampler.draw()
        >>> inputs.shape, bool((targets == inputs + 1).all())
        (torch.Size([2, 8]), True)
    """

    def __init__(self, tokens: Tensor, context: int, batch_size: int, seed: int) -> None:
        """See the class."""
        _check_tokens(tokens)
        require(context >= 1, f"context must be at least 1, got {context}")
        require(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}")
        require(
            len(tokens) >= context + 1,
            f"the training text has {len(tokens)} tokens, less than one block of "
            f"context + 1 = {context + 1}: use a longer text or a smaller context",
        )
        self._tokens = tokens
        self._offsets = torch.arange(context + 1)
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        """The next batch: inputs int64 [B, T] and targets int64 [B, T]."""
        blocks = len(self._tokens) - len(self._offsets) + 1
        starts = torch.randint(blocks, (self._batch_size, 1), generator=self._generator)
        batch = self._tokens[starts + self._offsets]  # [B, T + 1]
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def state(self) -> Tensor:
        """uint8 [S]: where the generator stands; `restore` continues from there."""
        return self._generator.get_state()

    def restore(self, state: Tensor) -> None:
        """Continue from a `state()`."""
        self._generator.set_state(state)


class EpochSampler:
    """The `Blocks` of a token file as `BlockSampler` gives a text's: inputs and targets.

    Args:
        blocks: of B blocks at once.
        check: called with the ids of each batch, int64 [B (T + 1)], to refuse them.
    """

    def __init__(self, blocks: Blocks, check: Callable[[Tensor], None] | None = None) -> None:
        """See the class."""
        self._blocks = blocks
        self._check = check

    def draw(self) -> tuple[Tensor, Tensor]:
        """The next batch: inputs int64 [B, T] and targets int64 [B, T]."""
        batch = self._blocks.draw()  # [B, T + 1]
        if self._check is not None:
            self._check(batch.flatten())
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def state(self) -> Tensor:
        """int64 [2]: epoch and position; `restore` continues from there."""
        return torch.tensor(list(self._blocks.state_dict().values()))

    def restore(self, state: Tensor) -> None:
        """Continue from a `state()`."""
        epoch, position = state.tolist()
        self._blocks.load_state_dict({"epoch": epoch, "position": position})


def validation_batches(
    tokens: Tensor, context: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Held-out text in order: every token but the first is a target exactly once.

    Blocks of T tokens that do not overlap, `batch_size` to a batch; what is left over comes last
    as one shorter row. Weight each batch's mean loss by its number of targets.

    Args:
        tokens: int64 [N], or the smaller integers of a token file.
        context: T.
        batch_size: rows per batch; the last full batch may have fewer.

    Yields:
        inputs and targets, int64 [b, T] with b <= batch_size, then int64 [1, (N - 1) % T].

    Example:
        >>> [tuple(x.shape) for x, _ in validation_batches(torch.arange(24), 4, 3)]
        [(3, 4), (2, 4), (1, 3)]
    """
    _check_tokens(tokens)
    full = max(len(tokens) - 1, 0) // context * context
    if full:
        inputs = tokens[:full].view(-1, context)  # [n, T]
        targets = tokens[1 : full + 1].view(-1, context)  # [n, T]
        for start in range(0, len(inputs), batch_size):
            rows = slice(start, start + batch_size)
            yield inputs[rows].long(), targets[rows].long()
    if len(tokens) - 1 > full:
        yield tokens[None, full:-1].long(), tokens[None, full + 1 :].long()


def pad_rows(rows: Sequence[Tensor | Sequence[Any]]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch, in the order in which they come.

    Args:
        rows: each [T] or [T, F], a tensor or (nested) numbers; T may be 0.

    Returns:
        [B, longest] or [B, longest, F] with zeros behind the shorter rows, and lengths int64 [B].

    Raises:
        UserError: no rows, or rows of different widths or types.

    Example:
        >>> pad_rows([[1, 2, 3], [4]])
        (tensor([[1, 2, 3],
                [4, 0, 0]]), tensor([3, 1]))
    """
    require(len(rows) >= 1, "rows must hold at least one row, got none")
    lengths = torch.tensor([len(row) for row in rows])
    full = next((torch.as_tensor(row) for row in rows if len(row)), torch.zeros(0))
    tensors = [torch.as_tensor(row) if len(row) else full[:0] for row in rows]
    for n, one in enumerate(tensors):
        require(
            one.dtype == full.dtype and one.shape[1:] == full.shape[1:],
            f"rows must be {full.dtype} {['T', *full.shape[1:]]}, got {one.dtype} "
            f"{list(one.shape)} in row {n}",
        )
    return pad_sequence(tensors, batch_first=True), lengths


def unigram_entropy(tokens: Tensor) -> float:
    """H = -sum_v p_v ln p_v of the token frequencies p, in nats per token.

    The loss of the best model that ignores what came before: what training must beat.

    Example:
        >>> round(unigram_entropy(torch.tensor([0, 1, 0, 1])), 4)
        0.6931
    """
    _check_tokens(tokens)
    counts = torch.bincount(tokens)
    p = counts[counts > 0].double() / len(tokens)
    return float(-(p * p.log()).sum())
