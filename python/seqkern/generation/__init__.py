"""Generation token by token: reading, drawing, stopping; `docs/generation.md` has the rules."""

from seqkern.generation.loop import check_new_tokens, generate, row_seeds
from seqkern.generation.reader import Decoder, window_start
from seqkern.generation.sampler import Sampler, Sampling, check_drawn
from seqkern.generation.speculative import check_draft

__all__ = [
    "Decoder",
    "Sampler",
    "Sampling",
    "check_draft",
    "check_drawn",
    "check_new_tokens",
    "generate",
    "row_seeds",
    "window_start",
]
