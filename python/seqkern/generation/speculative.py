"""Speculative decoding: a small model proposes tokens, the large one reads them all at once.

The draw of a token is a function of its logits, the row's seed and the step (`seqkern.ops.sample`).
So the large model draws at every place as it would have drawn alone, and the proposals are right
as far as they are what it drew: the tokens are those of generation without a draft, not merely
tokens of the same distribution. The draft draws with the same random numbers, which is what
makes two close distributions give the same token most of the time (a coupling by common random
numbers; Leviathan et al. 2023 and Chen et al. 2023 accept by a second draw instead).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    require(1 <= draft_tokens <= most, f"draft_tokens must be in [1, {most}], got {draft_tokens}")


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
        left = [
            sequences.prompts[row] + progress.new - sequences.lengths[row]
            for row in sequences.batch
        ]
        room = min(reader.make_room() for reader in readers)
        proposals = max(0, min(draft_tokens, room - 1, max(left) - 1))
        done = torch.tensor(
            [progress.new - n for n in left], device=device
        )  # [R] tokens each row has drawn
        drawn, logprobs, kept = _round(readers, last, proposals, done, sampler)
        counts = [min(n, m) for n, m in zip(kept.tolist(), left, strict=True)]
        last = drawn.gather(1, (kept - 1).unsqueeze(1)).squeeze(1)  # [R]
        sequences.extend(drawn, logprobs, counts)


def _round(
    readers: tuple[Reader, Reader], last: Tensor, proposals: int, steps: Tensor, sampler: Sampler
) -> tuple[Tensor, Tensor, Tensor]:
    """Propose, read, draw: tokens and log-probabilities [R, S], of which kept [R] are right."""
    model, draft = readers
    before: Any = draft.state
    tokens = [last]
    for s in range(proposals):
        logits, draft.state = draft.model.next_logits(tokens[-1].unsqueeze(1), draft.state)
        token, _ = sampler.draw(logits, steps + s)
        sampler.count(token.unsqueeze(1))
        tokens.append(token)
    # The last proposal too, so that the draft has read whatever will be kept.
    _, draft.state = draft.model.next_logits(tokens[-1].unsqueeze(1), draft.state)
    read = torch.stack(tokens, 1)  # [R, S], S = proposals + 1
    proposed = read[:, 1:]
    sampler.count(proposed, torch.full_like(proposed, -1))

    state = model.state
    logits, model.state = model.model.step_logits(read, state)  # [R, S, V]
    drawn, logprobs = sampler.draw_ahead(logits, proposed, steps)
    right = (drawn[:, :-1] == proposed).long().cumprod(1)  # [R, S - 1]
    kept = right.sum(1) + 1
    sampler.count(drawn, torch.cat((torch.ones_like(kept).unsqueeze(1), right), 1))
    model.state = model.model.rewind(model.state, state, read, kept)
    draft.state = draft.model.rewind(draft.state, before, read, kept)
    return drawn, logprobs, kept
