"""How well a language model predicts a text: loss, perplexity, bits per character, their errors."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from seqkern.data import validation_batches
from seqkern.errors import require
from seqkern.models import LanguageModel
from seqkern.progress import progress_bar


@dataclass(frozen=True)
class Evaluation:
    """The mean loss of a text and what follows from it; `None` errors are of a single block."""

    tokens: int  # predicted: all but the first
    blocks: int
    loss: float  # nats per token
    loss_error: float | None  # standard error

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    @property
    def perplexity_error(self) -> float | None:
        """By the delta method: d exp(x) = exp(x) dx."""
        return None if self.loss_error is None else self.perplexity * self.loss_error

    def bits_per_character(self, tokens_per_character: float) -> tuple[float, float | None]:
        """The loss in bits per character of the text, and its standard error."""
        factor = tokens_per_character / math.log(2)
        error = self.loss_error
        return self.loss * factor, None if error is None else error * factor


def summarize(sums: Tensor, counts: Tensor) -> Evaluation:
    r"""Mean loss of blocks, and its standard error.

    Losses of neighbouring tokens are not independent, so the error comes from the spread of whole
    blocks. With :math:`S_b` the sum of block :math:`b`'s losses and :math:`n_b` its tokens, the
    mean is the ratio :math:`\ell = \sum S_b / \sum n_b` and its error that of a ratio estimator
    (Cochran 1977, section 6.3):

    .. math:: se^2 = \frac{m}{m - 1} \frac{\sum_b (S_b - \ell n_b)^2}{(\sum_b n_b)^2}

    Args:
        sums: [m], losses of each block added up, in nats.
        counts: [m], tokens of each block.

    Example:
        >>> summarize(torch.tensor([4.0, 8.0]), torch.tensor([2, 2])).loss
        3.0
    """
    sums, counts = sums.double().cpu(), counts.double().cpu()
    blocks, total = len(sums), float(counts.sum())
    loss = float(sums.sum()) / total
    error = None
    if blocks > 1:
        spread = float((sums - loss * counts).square().sum())
        error = math.sqrt(blocks / (blocks - 1) * spread) / total
    return Evaluation(int(total), blocks, loss, error)


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    tokens: Tensor,
    context: int,
    batch_size: int = 32,
    progress: bool = False,
) -> Evaluation:
    """Predict each token of a text but the first, once, as validation in training does.

    The text is cut into blocks of `context` tokens that do not overlap; a block's state starts
    fresh, so its first tokens are predicted from few.

    Args:
        model: on any device.
        tokens: int64 [N], or the smaller integers of a token file; at least 2.
        context: tokens a block reads.
        batch_size: blocks read at once.
        progress: show a bar on stderr.

    Raises:
        UserError: fewer than two tokens, or a size below 1.
    """
    require(context >= 1, f"context must be at least 1, got {context}")
    require(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}")
    require(
        model.context is None or context <= model.context,
        f"context must be at most the model's, {model.context}, got {context}",
    )
    require(
        len(tokens) >= 2, f"the text must have at least 2 tokens to predict one, got {len(tokens)}"
    )
    device = next(model.parameters()).device
    sums, counts = [], []
    with progress_bar(progress, desc="evaluating", total=len(tokens) - 1, unit="tok") as bar:
        for inputs, targets in validation_batches(tokens, context, batch_size):
            terms = model.next_log_probs(inputs.to(device), targets.to(device))  # [b, T]
            sums.append(-terms.double().sum(1))
            counts.append(torch.full((len(terms),), terms.shape[1]))
            bar.update(terms.numel())
    return summarize(_joined(sums), _joined(counts))


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.cpu() for part in parts])
