"""The loop of generation; `seqkern.models.LanguageModel.generate` documents its arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor

from seqkern.errors import require
from seqkern.generation.graph import StepGraph
from seqkern.generation.progress import Progress
from seqkern.generation.reader import Decoder, Reader
from seqkern.generation.sampler import Sampler, Sampling, count_tokens
from seqkern.generation.sequences import Sequences
from seqkern.generation.speculative import speculate
from seqkern.machine import in_words, require_memory

# On a GPU whether rows have stopped is asked this seldom: asking waits for the device.
_STEPS_PER_LOOK = 16
_BYTES_PER_TOKEN = 12  # its id and its log-probability


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    lengths: Tensor | None = None,
    seed: int | Tensor | None = None,
    stop_tokens: Collection[int] | None = None,
    on_token: Callable[[Tensor], None] | None = None,
    return_logprobs: bool = False,
    draft: Decoder | None = None,
    draft_tokens: int = 4,
) -> Any:
    """Continue each row of a prompt; `LanguageModel.generate` documents the arguments."""
    B, T = prompt.shape
    _check_stops(stop_tokens, model.vocab_size)
    require(
        on_token is None or callable(on_token),
        f"on_token must be a function, got {type(on_token).__name__}",
    )
    check_new_tokens(B, max_new_tokens)
    prompt = prompt.long()
    starts: list[int] = [T] * B if lengths is None else lengths.tolist()
    sequences = Sequences(prompt, starts, max_new_tokens)
    counts = count_tokens(prompt, lengths, model.vocab_size) if sampling.penalises else None
    sampler = Sampler(sampling, row_seeds(seed, B, prompt.device), counts)
    progress = Progress(sequences, max_new_tokens, stop_tokens, on_token)
    if max_new_tokens > 0:
        if draft is None:
            _one_by_one(model, sequences, sampler, progress, max_new_tokens)
        else:
            speculate(model, draft, draft_tokens, sequences, sampler, progress)
    tokens, logprobs = sequences.result()
    return (tokens, logprobs) if return_logprobs else tokens


def _check_stops(stop_tokens: object, vocab_size: int) -> None:
    if stop_tokens is None:
        return
    words = f"stop_tokens must be a collection of ids in [0, {vocab_size})"
    require(isinstance(stop_tokens, Collection), f"{words}, got {stop_tokens!r}")
    for token in cast("Collection[object]", stop_tokens):
        known = isinstance(token, Integral) and 0 <= int(token) < vocab_size
        require(known, f"{words}, got {token!r} in it")


def check_new_tokens(rows: int, new: int) -> None:
    """Raise `UserError` for a number of new tokens that is negative, or fills the memory."""
    require(
        isinstance(new, Integral),
        f"max_new_tokens must be a whole number, got {type(new).__name__}",
    )
    require(new >= 0, f"max_new_tokens must be at least 0, got {new}")
    needed = rows * new * _BYTES_PER_TOKEN
    require_memory(
        needed,
        f"max_new_tokens {new} for {rows} rows need {in_words(needed)}",
        "ask for fewer",
    )


def _one_by_one(
    model: Decoder, sequences: Sequences, sampler: Sampler, progress: Progress, new: int
) -> None:
    reader = Reader(model, sequences)
    on_cpu = sequences.tokens.device.type == "cpu"
    look = 1 if on_cpu or progress.streams else _STEPS_PER_LOOK
    logits = reader.first_logits()
    captures = not on_cpu and model.keeps_state and model.is_capturable
    graph: StepGraph | None = None
    for step in range(new):
        if graph is not None:
            reader.spend()
            token, logprob = graph.replay()
        else:
            token, logprob = sampler.draw(logits, step)
            if sampler.counts is not None:
                sampler.count(token.unsqueeze(1))
        sequences.append(token, logprob)
        # What was drawn past a row's stop is left out: rows know nothing of each other.
        if not progress.idle and ((step + 1) % look == 0 or step + 1 == new):
            rows = progress.look(smallest_drop=0.5 if graph is None else math.inf)
            if rows == []:
                break
            if rows is not None:
                reader.select(rows)
                kept = torch.tensor(rows, device=token.device)
                sampler, token = sampler.select(kept), token[kept]
        if step + 1 == new:
            break
        if not captures:
            logits = reader.next_logits(token)
        elif graph is None:
            graph = StepGraph(model, reader.state, sampler, token, step + 1)


def row_seeds(seed: int | Tensor | None, B: int, device: torch.device) -> Tensor:
    """A seed per row: row b of seed s draws what a batch of one draws with s + b."""
    if isinstance(seed, Tensor):
        require(
            seed.shape == (B,) and seed.dtype == torch.int64,
            f"seed must be a number or int64 [{B}], got {seed.dtype} {list(seed.shape)}",
        )
        return seed.to(device)
    if seed is None:
        seed = torch.Generator().seed()
    require(
        isinstance(seed, Integral),
        f"seed must be a number or int64 [{B}], got {type(seed).__name__}",
    )
    first = seed % 2**63
    return torch.tensor([(first + b) % 2**63 for b in range(B)], device=device)
