"""Speculative decoding: a small model proposes tokens, the large one reads them all at once.

Leviathan et al. 2023 (arXiv:2211.17192), Chen et al. 2023 (arXiv:2302.01318): a proposal x drawn
from the draft's distribution q is kept with probability min(1, p(x) / q(x)) under the model's p;
the first that is not kept is replaced by a draw from max(p - q, 0), renormalised; after the last
one there is a draw from p. So every token has the distribution p, whatever the draft is; p and q
are after all sampling options. At temperature 0 the tokens are those without a
draft.

The three draws of a place (proposal, decision, replacement) have streams of random numbers of
their own under the row's seed, so a row's tokens depend on nothing around it.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seqkern.errors import require
from seqkern.generation.progress import Progress
from seqkern.generation.reader import Decoder, Reader
from seqkern.generation.sampler import Sampler
from seqkern.generation.sequences import Sequences
from seqkern.ops.attention_step import MAX_STEP_TOKENS


def check_draft(model: Decoder, draft: Decoder, draft_tokens: int) -> None:
    """Raise `UserError` for a draft that cannot propose tokens to `model`."""
    require(
        draft.vocab_size == model.vocab_size,
        f"draft must have the vocabulary of the model, {model.vocab_size} tokens, "
        f"got {draft.vocab_size}",
    )
    for name, decoder in (("the model", model), ("draft", draft)):
        require(
            decoder.keeps_state,
            f"draft needs models that keep what they read; {name} reads whole windows "
            "(backend torch)",
        )
    most = MAX_STEP_TOKENS - 1
    require(
        isinstance(draft_tokens, Integral) and 1 <= draft_tokens <= most,
        f"draft_tokens must be in [1, {most}], got {draft_tokens!r}",
    )


def speculate(
    model: Decoder,
    draft: Decoder,
    draft_tokens: int,
    sequences: Sequences,
    sampler: Sampler,
    progress: Progress,
) -> None:
    """Fill `sequences`; see the module."""
    device = sequences.tokens.device
    readers = Reader(model, sequences), Reader(draft, sequences)
    logits = readers[0].first_logits()
    readers[1].first_logits()
    last, logprob = sampler.draw(logits, 0)
    sampler.count(last.unsqueeze(1))
    sequences.append(last, logprob)
    while (rows := progress.look(smallest_drop=0.0)) != []:
        if rows is not None:
            for reader in readers:
                reader.select(rows)
            index = torch.tensor(rows, device=device)
            sampler, last = sampler.select(index), last[index]
        drawn_before = [sequences.lengths[row] - sequences.prompts[row] for row in sequences.batch]
        rooms = zip(*(reader.rooms() for reader in readers), strict=True)
        # A row's own: how far it may go in a round does not depend on the rows beside it.
        limits = [min(draft_tokens, *(room - 1 for room in pair)) for pair in rooms]
        drawn, logprobs, kept = _round(
            readers,
            last,
            torch.tensor(limits, device=device),
            max(limits),
            torch.tensor(drawn_before, device=device),
            sampler,
        )
        last = drawn.gather(1, (kept - 1).unsqueeze(1)).squeeze(1)  # [R]
        left = (progress.new - n for n in drawn_before)
        counts = [min(n, m) for n, m in zip(kept.tolist(), left, strict=True)]
        sequences.extend(drawn, logprobs, counts)


def _round(
    readers: tuple[Reader, Reader],
    last: Tensor,
    limits: Tensor,
    proposals: int,
    steps: Tensor,
    sampler: Sampler,
) -> tuple[Tensor, Tensor, Tensor]:
    """Propose, read, decide: tokens and log-probabilities [R, S], of which kept [R] count.

    A row uses the first limits[r] of the proposals; what it reads beyond is forgotten.
    """
    model, draft = readers
    proposer, judge = sampler.stream(1), sampler.stream(2)
    before: Any = draft.state
    tokens, q, drafted = [last], [], []
    for s in range(proposals):
        scores, draft.state = draft.model.step_logits(tokens[-1].unsqueeze(1), draft.state)
        q.append(proposer.distribution(scores[:, -1]))
        token, logprob = proposer.draw(scores[:, -1], steps + s)
        sampler.count(token.unsqueeze(1))
        tokens.append(token)
        drafted.append(logprob)
    # The last proposal too, so that the draft has read whatever will be kept.
    _, draft.state = draft.model.step_logits(tokens[-1].unsqueeze(1), draft.state)
    read = torch.stack(tokens, 1)  # [R, S], S = proposals + 1
    proposed = read[:, 1:]
    sampler.count(proposed, torch.full_like(proposed, -1))

    state = model.state
    logits, model.state = model.model.step_logits(read, state)  # [R, S, V]
    p = sampler.distribution(logits, proposed)
    kept = torch.zeros_like(last)
    unknown = torch.zeros_like(read, dtype=torch.bool)  # [R, S]
    if proposals > 0:
        left, held = _decide(p[:, :-1], torch.stack(q, 1), proposed, steps, judge)
        kept = held.minimum(limits)
        within = torch.arange(proposals, device=last.device) < limits.unsqueeze(1)  # [R, S - 1]
        p = torch.cat((torch.where(within.unsqueeze(2), left, p[:, :-1]), p[:, -1:]), 1)
        unknown = F.pad(torch.stack(drafted, 1).isnan() & within, (0, 1))
    replaced, drawn_logprob = (
        t.gather(1, kept.unsqueeze(1)) for t in sampler.draw_from(p, steps)
    )  # [R, 1]
    drawn = torch.cat((proposed, last.unsqueeze(1)), 1).scatter(1, kept.unsqueeze(1), replaced)
    logprobs = torch.log_softmax(logits.float(), -1).gather(2, drawn.unsqueeze(2)).squeeze(2)
    place = torch.arange(drawn.shape[1], device=drawn.device)
    # Penalties may leave nothing of finite logits, and a draft may diverge by itself.
    unknown = unknown | ((place == kept.unsqueeze(1)) & drawn_logprob.isnan())
    logprobs = logprobs.masked_fill(unknown, torch.nan)
    kept = kept + 1
    sampler.count(drawn, (place < kept.unsqueeze(1)).long())
    model.state = model.model.rewind(model.state, state, read, kept)
    draft.state = draft.model.rewind(draft.state, before, read, kept)
    return drawn, logprobs, kept


def _decide(
    p: Tensor, q: Tensor, proposed: Tensor, steps: Tensor, judge: Sampler
) -> tuple[Tensor, Tensor]:
    """What is left of p [R, S, V] where a proposal [R, S] fails, and how many hold [R]."""
    at = proposed.unsqueeze(2)
    # The sampler's own rounding may draw what float64 gives no probability: then it is p's matter.
    ratio = (p.gather(2, at) / q.gather(2, at)).nan_to_num(0.0, 1.0).clamp(max=1)  # [R, S, 1]
    refused, _ = judge.draw_from(torch.cat((ratio, 1 - ratio), 2), steps)  # [R, S] 0 or 1
    left = (p - q).clamp(min=0)
    # Nothing is left where p = q; there nothing is refused either.
    left = torch.where(left.sum(2, keepdim=True) > 0, left, p)
    return left / left.sum(2, keepdim=True), (1 - refused).cumprod(1).sum(1)
