"""From a model that scores the next token to whole sequences: sampling and beam search.

Rows end by themselves, at a stop token. The shapes of a step do not depend on which rows have
ended, so a row's result does not depend on how long the others are.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from seqkern.errors import require
from seqkern.generation import Sampler, check_drawn

# Reads a token [N] (None: the start) and gives logits [N, V + 1]; token V stops.
Step = Callable[[Tensor | None], Tensor]


class Decoded(NamedTuple):
    """Sequences that a model wrote. A row as long as the limit did not end."""

    tokens: Tensor  # int64 [B, T]; past a row's length the stop token
    lengths: Tensor  # int64 [B], the stop token not counted
    log_prob: Tensor  # float32 [B], ln p of the row, its stop token included where it has one


def sample_sequences(step: Step, stop: int, max_tokens: int, sampler: Sampler) -> Decoded:
    """Draw each row token by token, up to its stop token or `max_tokens`."""
    device = sampler.seeds.device
    log_prob = torch.zeros(len(sampler.seeds), device=device)  # [B]
    lengths = torch.zeros_like(log_prob, dtype=torch.int64)
    going = torch.ones_like(log_prob, dtype=torch.bool)
    token: Tensor | None = None
    drawn = []
    for n in range(max_tokens):
        chosen, of_chosen = sampler.draw(step(token), n)  # each [B]
        log_prob = torch.where(going, log_prob + of_chosen, log_prob)
        going = going & (chosen != stop)
        lengths = lengths + going
        drawn.append(torch.where(going, chosen, stop))
        if not bool(going.any()):
            break
        token = torch.where(going, chosen, 0)  # what an ended row reads does not matter
    check_drawn(log_prob)
    return Decoded(torch.stack(drawn, 1)[:, : int(lengths.max())], lengths, log_prob)


def beam_search(
    step: Step,
    reorder: Callable[[Tensor], None],
    B: int,
    stop: int,
    max_tokens: int,
    beams: int,
    length_penalty: float,
    device: torch.device,
) -> Decoded:
    r"""The sequence with the largest :math:`\ln p(y) / n^\alpha` that the beams find.

    n counts the stop token, alpha is `length_penalty`. In each step every beam may end, and the
    `beams` best ways to go on, over all beams of the row, go on. The search is over when no beam of
    any row can still become better than the row's best: as ln p only falls, that is when
    :math:`\ln p / \mathrm{max\_tokens}^\alpha` is not larger.

    Args:
        step: over B * beams rows.
        reorder: makes row n of what `step` continues what row rows[n] is.
        B: rows of the result.
        stop: the stop token, the last of the vocabulary.
        max_tokens: most tokens of a row, the stop token among them.
        beams: K.
        length_penalty: alpha.
        device: of the logits.
    """
    rows = torch.arange(B, device=device)
    # One beam per row at first: the others would be its copies.
    log_prob = torch.full((B, beams), -torch.inf, device=device)
    log_prob[:, 0] = 0
    history = torch.full((B, beams, max_tokens), stop, device=device)
    best = torch.full((B,), -torch.inf, device=device)  # score of `ended`
    ended = Decoded(history[:, 0], torch.zeros_like(rows), best)
    token: Tensor | None = None
    for n in range(max_tokens):
        logits = step(token)  # [B * K, V + 1]
        require(bool(logits.isfinite().all()), "the logits are not finite: a run that diverged")
        step_log_prob = F.log_softmax(logits, -1, dtype=torch.float32).view(B, beams, -1)
        scores = log_prob[..., None] + step_log_prob  # [B, K, V + 1]

        score, beam = (scores[..., stop] / (n + 1) ** length_penalty).max(1)  # [B]
        better = score > best
        best = torch.where(better, score, best)
        ended = Decoded(
            torch.where(better[:, None], history[rows, beam], ended.tokens),
            torch.where(better, n, ended.lengths),
            torch.where(better, scores[rows, beam, stop], ended.log_prob),
        )

        going = scores[..., :stop].flatten(1)  # [B, K * V]
        log_prob, choice = _largest(going, beams)  # [B, K]
        beam, token = choice // stop, choice % stop
        history = history[rows[:, None], beam]  # [B, K, max_tokens]
        history[..., n] = token
        reorder((rows[:, None] * beams + beam).flatten())
        token = token.flatten()
        if bool((best >= log_prob[:, 0] / max_tokens**length_penalty).all()):
            break
    return ended._replace(tokens=ended.tokens[:, : int(ended.lengths.max())])


def _largest(scores: Tensor, beams: int) -> tuple[Tensor, Tensor]:
    """The `beams` largest of each row and their places; -inf where there are less."""
    lacking = beams - scores.shape[1]
    if lacking > 0:
        scores = F.pad(scores, (0, lacking), value=-torch.inf)
    values, places = scores.topk(beams)
    return values, torch.where(values == -torch.inf, 0, places)
