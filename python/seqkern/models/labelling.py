"""Labels for sequences: one for each (many to one), or one for each element (many to many)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.errors import require
from seqkern.models.backends import layers, loss_of_head
from seqkern.models.encoder import Encoder, EncoderConfig
from seqkern.models.language_model import check_sizes, evaluating
from seqkern.models.padding import check_lengths, check_range, clean_tokens, valid_steps

POOLINGS = ("last", "mean", "max")
_IGNORED = -100


class SequenceClassifier(nn.Module):
    r"""p(class | sequence): many to one, for rows of any length in any order.

    .. math:: p = \mathrm{softmax}(W r + b)

    where :math:`r` pools the states :math:`h_1 .. h_n` of an `Encoder` over the row's own n
    elements: the state in which it ended (`last`), their mean, or their largest values (`max`).
    In batches of one shape a row's result is the same bit for bit whatever its padding and the
    other rows hold; in a batch of another shape PyTorch's matrix products may round differently.

    Args:
        encoder: what is read.
        classes: K.
        pooling: `last`, `mean` or `max`.
        backend: `seqkern` or `torch`; the parameters of the same seed are the same for both.

    Example:
        >>> model = SequenceClassifier(EncoderConfig(features=3, hidden=8), classes=2)
        >>> model(torch.randn(4, 10, 3), lengths=torch.tensor([10, 1, 7, 3])).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        classes: int,
        pooling: str = "last",
        backend: str = "seqkern",
    ) -> None:
        """See the class."""
        super().__init__()
        require(
            pooling in POOLINGS, f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}"
        )
        check_sizes(classes=classes)
        made = layers(backend)
        self.pooling, self.classes = pooling, classes
        self.encoder = Encoder(encoder, made)
        self.head = nn.Linear(encoder.hidden, classes)
        self.loss = made.CrossEntropyLoss()

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Scores of the classes, and the loss where the right ones are given.

        Args:
            x: integers [B, T], or floating point [B, T, F] of records; padding holds anything.
            lengths: int64 or int32 [B], from 1 to T; None where nothing is padding.
            targets: int64 [B], classes.

        Returns:
            logits [B, K]; with targets (logits, loss), the mean cross-entropy in nats.

        Raises:
            UserError: an argument of the wrong dtype, shape or range.
        """
        logits: Tensor = self.head(self.pooled(x, lengths))  # [B, K]
        if targets is None:
            return logits
        B = len(logits)
        require(
            targets.shape == (B,) and targets.dtype == torch.int64,
            f"targets must be int64 [{B}], got {targets.dtype} {list(targets.shape)}",
        )
        check_range(targets, self.classes, "targets")
        return logits, self.loss(logits, targets)

    def pooled(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The vector [B, H] that stands for each row."""
        lengths = check_lengths(lengths, x)
        valid = valid_steps(lengths, x.shape[1])
        states = self.encoder(x, lengths, valid)  # [B, T, H]
        pooled: Tensor
        if self.pooling == "last":
            pooled = self.encoder.last(states, lengths)
        elif self.pooling == "mean":
            pooled = states.sum(1) / lengths[:, None]
        else:
            pooled = states.masked_fill(~valid[..., None], -torch.inf).amax(1)
        return pooled

    def probabilities(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """p(class) [B, K], at least float32, dropout off."""
        return _probabilities(self, x, lengths)


class SequenceTagger(nn.Module):
    r"""p(tag of element t | sequence) for every t: many to many, one output per input.

    .. math:: p_t = \mathrm{softmax}(W h_t + b)

    where :math:`h_t` is the state of an `Encoder`, which reads both ways unless told otherwise. In
    batches of one shape a row's result is the same bit for bit whatever its padding and the other
    rows hold; in a batch of another shape PyTorch's matrix products may round differently.

    Args:
        encoder: what is read.
        tags: K.
        backend: `seqkern` or `torch`; the parameters of the same seed are the same for both.

    Example:
        >>> model = SequenceTagger(EncoderConfig(vocab_size=30, hidden=8), tags=5)
        >>> model(torch.tensor([[1, 2, 3], [4, 0, 0]]), lengths=torch.tensor([3, 1])).shape
        torch.Size([2, 3, 5])
    """

    def __init__(self, encoder: EncoderConfig, tags: int, backend: str = "seqkern") -> None:
        """See the class."""
        super().__init__()
        check_sizes(tags=tags)
        made = layers(backend)
        self.tags = tags
        self.encoder = Encoder(encoder, made)
        self.head = nn.Linear(encoder.hidden, tags)
        self.loss = made.LinearCrossEntropyLoss(ignore_index=_IGNORED)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        return_logits: bool = False,
    ) -> Tensor | tuple[Tensor | None, Tensor]:
        """Scores of the tags of every element, and the loss where the right ones are given.

        Args:
            x: integers [B, T], or floating point [B, T, F] of records; padding holds anything.
            lengths: int64 or int32 [B], from 1 to T; None where nothing is padding.
            targets: int64 [B, T], tags; padding holds anything, and -100 asks for no tag.
            return_logits: make the logits beside the loss too.

        Returns:
            logits [B, T, K], zero in the padding; with targets (None, loss) or, with
            return_logits, (logits, loss); loss is the mean cross-entropy of all tags in nats.

        Raises:
            UserError: an argument of the wrong dtype, shape or range.
        """
        lengths = check_lengths(lengths, x)
        valid = valid_steps(lengths, x.shape[1])
        states = self.encoder(x, lengths, valid)  # [B, T, H]
        logits = None
        if targets is None or return_logits:
            logits = torch.where(valid[..., None], self.head(states), 0.0)  # [B, T, K]
        if targets is None:
            assert logits is not None
            return logits
        require(
            targets.shape == valid.shape and targets.dtype == torch.int64,
            f"targets must be int64 {list(valid.shape)}, got {targets.dtype} {list(targets.shape)}",
        )
        asked = valid & (targets != _IGNORED)
        targets = torch.where(asked, clean_tokens(targets, asked, self.tags, "targets"), _IGNORED)
        return logits, loss_of_head(self.loss, self.head, states, targets)

    def probabilities(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """p(tag) [B, T, K], at least float32, dropout off; zero in the padding."""
        p = _probabilities(self, x, lengths)
        return torch.where(valid_steps(check_lengths(lengths, x), x.shape[1])[..., None], p, 0.0)


@torch.no_grad()
def _probabilities(model: nn.Module, x: Tensor, lengths: Tensor | None) -> Tensor:
    with evaluating(model):
        logits: Tensor = model(x, lengths)
    return F.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
